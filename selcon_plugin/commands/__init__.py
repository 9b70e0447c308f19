"""Commands of ``selcon``: modules with a ``main(argv)``; hosts are imported inside."""
