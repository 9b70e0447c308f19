"""Commands of ``selcon``, a module each with a ``main(argv)``; they import the hosts."""
