def chat() -> None:
    """x

    Examples:
    mixtral chat
    """
