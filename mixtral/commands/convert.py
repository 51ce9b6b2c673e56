def convert() -> None:
    """x

    Examples:
    mixtral convert
    """
