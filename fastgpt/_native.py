"""Stub until the native helper writes it."""
BUILT = {"cpu": False, "cuda": False}


def reason(backend: str) -> str:
    return "not built"
