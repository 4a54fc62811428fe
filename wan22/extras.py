"""The optional packages: how they are installed, under the name that the package index has for wan22."""

DISTRIBUTION = "wan22-pipelines"


def install_command(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml, quoted as every shell takes it."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'
