"""Transformer blocks, attention kernels and metrics shared by the separata packages."""


def __getattr__(name: str) -> str:
    # The version is written once, in pyproject.toml, and read only when asked for.
    if name == "__version__":
        from importlib.metadata import version

        return version("separata-shared")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
