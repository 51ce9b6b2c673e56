"""The subcommands, one file each: typer functions, registered in cli.py.

What a command needs beyond typer it imports in its function, so that `mixtral --help` stays fast.
"""
