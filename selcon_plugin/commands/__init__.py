"""Commands of ``selcon``, a module each with a ``main(argv)``; hosts imported inside."""
