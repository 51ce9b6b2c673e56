def generate() -> None:
    """x

    Examples:
    mixtral generate
    """
