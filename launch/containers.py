"""A container that ranks run in: its image, how it is started, and what of the host it sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..configs.errors import UsageError
from .slurm_options import check_word

Runtime = Literal["pyxis", "apptainer"]
RUNTIMES: tuple[Runtime, ...] = ("pyxis", "apptainer")


@dataclass(frozen=True)
class Mount:
    """A folder of the host and where it is inside."""

    source: str
    target: str
    writable: bool = True

    def __str__(self) -> str:
        return f"{self.source}:{self.target}" + ("" if self.writable else ":ro")

    def holds(self, path: Path) -> bool:
        """Whether ``path``, as it is inside, lies in it."""
        return path.is_relative_to(self.target)


@dataclass(frozen=True)
class Container:
    """What ranks run in."""

    runtime: Runtime
    image: str
    mounts: tuple[Mount, ...]


def parse_container(image: str | None, runtime: Runtime | None, mounts: Sequence[str]) -> Container | None:
    """The container of the options; None where there are none. Raises UsageError where they do not go together."""
    if image is None:
        given = f"--container-runtime {runtime}" if runtime else f"--mount {mounts[0]}" if mounts else None
        if given is not None:
            raise UsageError(f"{given} needs an image: add --container IMAGE")
        return None
    if runtime is None:
        raise UsageError(f"--container {image} does not say what starts it: add --container-runtime pyxis or apptainer")
    check_word("--container", image)
    if image.startswith(("/", "./", "../")) and not Path(image).exists():
        raise UsageError(f"--container {image} is not there: name an image file, or one of a registry")
    return Container(runtime, image, tuple(map(_parse_mount, mounts)))


def with_folders(container: Container, folders: Iterable[tuple[str, Path, bool]]) -> Container:
    """``container`` with further mounts, so that each folder is seen inside where it is outside.

    ``folders`` are their names in sentences, their places, and whether they are written; those that are come first.
    Raises UsageError where a mount puts something else in that place, or does not let it be written.
    """
    mounts = list(container.mounts)
    for name, folder, written in folders:
        seen = max((mount for mount in mounts if mount.holds(folder)), key=_depth, default=None)
        if seen is None:
            mounts.append(_checked(Mount(str(folder), str(folder), written), name))
        elif seen.source.rstrip("/") != seen.target.rstrip("/"):
            raise UsageError(f"--mount {seen} hides {name}={folder} in the container: mount it elsewhere")
        elif written and not seen.writable:
            raise UsageError(f"--mount {seen} does not let {name}={folder} be written: leave out :ro")
    # The last mount is what one sees, so those within others come after them.
    return Container(container.runtime, container.image, tuple(sorted(mounts, key=_depth)))


def _depth(mount: Mount) -> int:
    return len(Path(mount.target).parts)


def _parse_mount(text: str) -> Mount:
    check_word("--mount", text)
    source, *rest = text.split(":")
    target = rest[0] if rest else source
    if len(rest) > 2 or rest[1:] not in ([], ["ro"], ["rw"]) or not (source.startswith("/") and target.startswith("/")):
        raise UsageError(f"--mount {text} is not SOURCE:TARGET or SOURCE:TARGET:ro with absolute paths")
    return _checked(Mount(source, target, rest[1:] != ["ro"]), "--mount")


def _checked(mount: Mount, name: str) -> Mount:
    for path in (mount.source, mount.target):
        if "," in path or ":" in path:
            raise UsageError(
                f"{name}={path} holds a comma or a colon, with which containers divide lists of mounts: rename it"
            )
    return mount
