"""The command line: ``trine pretrain``, ``trine launch``, ``trine parity``, ``trine data``,
``trine checkpoint`` and ``trine doctor``.

Each command imports what it needs when it runs, so that ``trine --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from ..configs.errors import RunError, UsageError
from . import checkpoint_commands, data_commands, data_reports, launch_commands
from .exit_codes import tell

if TYPE_CHECKING:
    from ..configs.schema import Config
    from ..pretrain.place import Place

_EXIT_CODES = "exit codes: 0 done; 1 failed; 2 wrong use; 130 stopped by Ctrl-C"
_STOPPED = "75 stopped before the end, with everything saved: the same command continues the run"
_RUN_EXIT_CODES = f"{_EXIT_CODES};\n{_STOPPED}"

_PRETRAIN = """\
Pretrain the model of a recipe, or continue a run that was stopped: the same command resumes from the newest
checkpoint in the run's folder.

Started alone, the command starts one rank per GPU or, where there are no GPUs, as many ranks as the recipe
divides the model over. Started by torchrun, srun or mpirun, each process is one rank."""

_PRETRAIN_EXAMPLES = f"""\
examples:
  trine pretrain configs/demo.yaml
  trine pretrain configs/demo.yaml train.steps=1000 parallel.pipeline=2 --nproc 4
  torchrun --nproc-per-node 8 -m trine pretrain configs/yoco/3b.yaml

{_RUN_EXIT_CODES}"""

_PARITY = """\
Compare layouts of a model with one process on this machine: the same few training steps are computed under each,
and losses, gradient norms, every gradient and every parameter afterwards must agree within fixed tolerances: 1e-5
for loss and gradient norm, 1e-4 for gradients and parameters. No data are needed.

It computes in fp32 on random tokens, with an optimizer and a small global batch of its own; the layout of the
recipe does not count. A layout is named by its parts, joined by '+':
  tpN, ppN, cpN, dpN  N tensor ranks, pipeline stages, context ranks, data ranks
  vppN                N model chunks per pipeline stage (interleaved)
  sp                  sequence parallelism over the tensor ranks
  a2a                 context ranks exchange tokens for heads
  even                the same number of layers in every stage
  selective           activation recompute between matrix products
  recompute           activation recompute of whole layers"""

_PARITY_EXAMPLES = """\
examples:
  trine parity configs/parity.yaml
  trine parity configs/yoco/400m.yaml model.stack.0.layers=2 model.stack.2.layers=2 train.sequence_length=256 \\
      model.vocabulary_size=4096 --layouts tp2+sp,pp2,cp2
  trine parity configs/parity.yaml --layouts tp2,cp2 --json - 2>/dev/null

exit codes: 0 every layout agrees; 1 one does not, or failed; 2 wrong use; 130 stopped by Ctrl-C"""

_DOCTOR = """\
Tell what this machine and this Python environment can do: what is there, what is not, and what that would
give."""

_DOCTOR_EXAMPLES = """\
example:
  trine doctor

exit codes: 0 models can be trained here; 1 something that every run needs is missing; 2 wrong use"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (by default the process's own) and return its exit code.

    0 done, 1 failed, 2 wrong use, 75 stopped and saved, 130 interrupted. Messages go to standard error. A process
    that is a rank of torchrun, srun or mpirun ends inside where its rank fails.
    """
    try:
        arguments = _parse(argv)
        code: int = arguments.command(arguments)
        return code
    except SystemExit as done:  # argparse has printed the help or the version
        return int(done.code or 0)
    except (UsageError, RunError, KeyboardInterrupt) as error:
        return tell(error)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors end like every other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; '{self.prog} --help' describes the command")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _build_parser()
    typed = sys.argv[1:] if argv is None else argv
    arguments, rest = parser.parse_known_args(typed, argparse.Namespace(typed=tuple(typed)))
    if rest:
        # argparse takes positionals from one place only; overrides may also follow an option.
        if "overrides" not in arguments or any(word.startswith("-") for word in rest):
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trine",
        description="Pretrain Differential Transformer, RetNet and YOCO language models on Megatron-Core.",
        epilog=f"{_EXIT_CODES}\n\n'trine COMMAND --help' describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trine {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_pretrain(commands)
    _add_parity(commands)
    _add_data(commands)
    _add_launch(commands)
    _add_checkpoint(commands)
    doctor = _add(commands, "doctor", "tell what this machine can do", _DOCTOR, _DOCTOR_EXAMPLES)
    doctor.set_defaults(command=_doctor, parser=doctor)
    return parser


def _add_pretrain(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add(commands, "pretrain", "train a model, or continue", _PRETRAIN, _PRETRAIN_EXAMPLES)
    _add_recipe(parser, "the recipe of the run")
    parser.add_argument(
        "--nproc", type=int, metavar="N",
        help="ranks to start here (default: one per GPU, or tensor x pipeline x context without GPUs)",
    )  # fmt: skip
    parser.set_defaults(command=_pretrain, parser=parser)


def _add_parity(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add(commands, "parity", "compare layouts with one process", _PARITY, _PARITY_EXAMPLES)
    _add_recipe(parser, "the recipe of the model")
    parser.add_argument(
        "--layouts", metavar="A,B,...",
        help="layouts by name (default: a standard list of up to 8 ranks, of which what cannot be is listed)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too; - for standard output")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="where to compute (default: gpu where there are two or more)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S",
        help="seconds that one layout may take, the start of its ranks included (default: %(default)g)",
    )  # fmt: skip
    parser.set_defaults(command=_parity, parser=parser)


def _add_recipe(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help=what)
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key.sub=value", help="values laid over the recipe, in order"
    )


def _add_data(commands: argparse._SubParsersAction[_Parser]) -> None:
    summary = "prepare the data that runs read, and look at it"
    data = _add(commands, "data", summary, f"{summary[0].upper()}{summary[1:]}.", "")
    subcommands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    epilog = f"{data_commands.EXAMPLES}\n\n{_EXIT_CODES}"
    prepare = _add(subcommands, "prepare", data_commands.SUMMARY, data_commands.DESCRIPTION, epilog)
    data_commands.add_prepare_options(prepare)
    data_reports.add_verify(partial(_add, subcommands))
    data_reports.add_stats(partial(_add, subcommands))


def _add_checkpoint(commands: argparse._SubParsersAction[_Parser]) -> None:
    module = checkpoint_commands
    checkpoint = _add(commands, "checkpoint", module.SUMMARY, module.DESCRIPTION, "")
    subcommands = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    module.add_commands(partial(_add, subcommands))


def _add_launch(commands: argparse._SubParsersAction[_Parser]) -> None:
    launch = _add(commands, "launch", launch_commands.SUMMARY, launch_commands.DESCRIPTION, "")
    subcommands = launch.add_subparsers(title="commands", metavar="COMMAND", required=True)
    launch_commands.add_commands(partial(_add, subcommands), _add_recipe, _words, _launch_alone)


def _add(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, description: str, epilog: str
) -> _Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _pretrain(arguments: argparse.Namespace) -> int:
    from .environment import find_place

    words = _words(arguments)
    place = find_place()
    if _is_rank(place):
        if arguments.nproc is not None:
            raise UsageError(
                f"--nproc {arguments.nproc} has no effect under {place.source}, which starts the ranks: leave it out"
            )
        from .worker import main as run_rank

        return run_rank(words)
    return _launch(words, arguments.nproc)


def _words(arguments: argparse.Namespace) -> list[str]:
    return [str(arguments.config), *_overrides(arguments)]


def _overrides(arguments: argparse.Namespace) -> list[str]:
    overrides = list[str](arguments.overrides)
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"{override!r} is no override: write key.sub=value, such as train.steps=100")
    return overrides


def _is_rank(place: Place) -> bool:
    # srun with a single task, as for an interactive shell, has no others to meet: it may start ranks itself.
    return place.source in ("torchrun", "mpi") or place.world_size > 1


def _launch_alone(words: Sequence[str], asked: int | None) -> int:
    from .environment import find_place

    place = find_place()
    if _is_rank(place):
        raise UsageError(f"trine launch local starts its own ranks: run it by itself, without {place.source}")
    return _launch(words, asked)


def _launch(words: Sequence[str], asked: int | None) -> int:
    """Start the ranks, after everything that can be refused has been looked at."""
    from ..configs.checks import check_config, check_layout
    from ..configs.engine_checks import check_engine_is_installed
    from ..configs.loading import load_config, set_vocabulary
    from ..data_pipeline.opening import read_prepared

    recipe, *overrides = words
    config = load_config(Path(recipe), overrides)
    check_config(config)
    check_engine_is_installed(config)
    config = set_vocabulary(config, read_prepared(config.data).vocabulary_size)
    processes = _processes(config, asked)
    check_layout(config, processes)

    from .local import launch_local

    directory = config.run.directory
    return launch_local(
        words, processes, directory / "logs",
        run_directory=directory, checkpoint_directory=config.checkpoint_directory,
    )  # fmt: skip


def _processes(config: Config, asked: int | None) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if asked is None:
        return gpus or config.parallel.model_parallel
    if asked < 1:
        raise UsageError(f"--nproc {asked} starts no rank: use 1 or more")
    if 0 < gpus < asked:
        raise UsageError(f"--nproc {asked} needs as many GPUs and this machine has {gpus}: use {gpus} or fewer")
    return asked


def _parity(arguments: argparse.Namespace) -> int:
    from ..configs.loading import load_config
    from .environment import find_place

    overrides, place = _overrides(arguments), find_place()
    if _is_rank(place):
        raise UsageError(f"trine parity starts its own ranks: run it by itself, without {place.source}")
    from .parity_command import run_parity

    return run_parity(
        load_config(arguments.config, overrides),
        str(arguments.config),
        layouts=arguments.layouts,
        steps=arguments.steps,
        seconds=arguments.timeout,
        device=arguments.device,
        json_target=arguments.json,
    )


def _doctor(_: argparse.Namespace) -> int:
    from .doctor import report, table, works

    findings = report()
    print(table(findings))
    return 0 if works(findings) else 1
