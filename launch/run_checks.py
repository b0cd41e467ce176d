"""What can be refused of a run before it is sent elsewhere: its configuration, its layout, its data, its folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..configs.checks import check_layout
from ..configs.engine_checks import check_engine_is_installed
from ..configs.errors import UsageError
from ..configs.loading import load_config, set_vocabulary
from ..configs.locations import is_remote
from ..configs.remedies import divisors, listed
from ..configs.schema import Config


def checked_config(
    recipe: Path, overrides: Sequence[str], ranks_of_nodes: Sequence[int], option: str, python: str
) -> Config:
    """The configuration of a run on nodes with so many ranks each, which ``option`` gave.

    Remote data are not asked for: the ranks may reach what this machine does not. What is installed is looked at only
    where ``python``, which the ranks use, is this interpreter.

    Raises:
        UsageError: with one sentence for the first thing that cannot be.
        RunError: the data are damaged.
    """
    from ..data_pipeline.opening import read_prepared
    from ..data_pipeline.shards.manifest import load_manifest
    from ..data_pipeline.storage.folder import open_folder

    config = load_config(recipe, overrides)
    check_layout(config, sum(ranks_of_nodes))
    if python == sys.executable:
        check_engine_is_installed(config)
    local = local_data(config)
    if len(local) == len(config.data.mixture):
        config = set_vocabulary(config, read_prepared(config.data).vocabulary_size)
        check_layout(config, sum(ranks_of_nodes))
    else:
        for folder in local:
            load_manifest(open_folder(str(folder)))
    for count in set(ranks_of_nodes):
        _check_tensor_ranks(config.parallel.tensor, count, option)
    check_folder("run.directory", config.run.directory)
    check_folder("checkpoint.directory", config.checkpoint_directory)
    return config


def local_data(config: Config) -> list[Path]:
    """The folders of prepared data that are in a file system."""
    return [Path(source.directory) for source in config.data.mixture if not is_remote(source.directory)]


def check_folder(name: str, folder: Path) -> None:
    """Raise UsageError unless the folder is there, or can be made, and can be written."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{name}={folder} cannot be made, since {there} is no folder: choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{name}={folder} cannot be written, since {there} may not: choose another place")


def _check_tensor_ranks(tensor: int, ranks_per_node: int, option: str) -> None:
    if ranks_per_node % tensor:
        raise UsageError(
            f"parallel.tensor={tensor} does not divide {option} {ranks_per_node}, so tensor ranks would exchange over "
            f"the network: the tensor sizes that stay within a node are {listed(divisors(ranks_per_node))}"
        )
