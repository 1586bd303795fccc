"""Print, as one line, the versions that this interpreter has of what matters here."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ["jax", "jaxlib", "optax", "flax", "equinox", "orbax-checkpoint"]


def found(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


have = ", ".join(f"{package} {found(package)}" for package in PACKAGES)
print(f"python {platform.python_version()}, {have}")
