"""``trine checkpoint inspect``: what one checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..pretrain.checkpoints.contents import OPTIMIZER, Contents, TensorEntry, read_contents
from ..pretrain.checkpoints.document import Document
from ..pretrain.checkpoints.manifest import FORMAT, RANDOM, STATE, TENSORS
from .checkpoint_list import layout_of, written
from .checkpoint_places import Place
from .checkpoint_text import UNKNOWN, count, integer, local_time, number, say, size, stream_for_text, table, utc_time
from .targets import write_json

_READ = (STATE, TENSORS, RANDOM)


def show_report(place: Place, pattern: str | None, json_target: str | None) -> int:
    """Print what the checkpoint, or the newest complete one, holds. Returns 1 where it is damaged, else 0.

    Raises RunError where it has another format.
    """
    stream = stream_for_text(json_target)
    chosen = place.complete()
    if not chosen:
        say([place.nothing], stream)
        return 0
    path = chosen[-1].path
    contents = read_contents(path, hashed=_READ)
    tensors = [t for t in contents.tensors if pattern is not None and fnmatchcase(t.name, pattern)]
    say(_report(contents), stream)
    if pattern is not None:
        say(["", *_listed(tensors, pattern)], stream)
    if json_target is not None:
        listed = {"tensors": [_tensor_document(t) for t in tensors]} if pattern is not None else {}
        write_json(_document(contents) | listed, json_target)
    return 1 if contents.wrong else 0


def _report(contents: Contents) -> list[str]:
    rows = {
        "written": f"{local_time(written(contents.path))}, format {FORMAT if contents.files else UNKNOWN}",
        "progress": _progress(contents),
        "model": _model(contents.run.at("model")),
        "parameters": integer(_parameters(contents)),
        "layout": layout_of(contents),
        "precision": f"{contents.run.at('compute').text or UNKNOWN} compute",
        "schedule": _schedule(contents),
        "watch": _watch(contents.run.at("watch")),
        "tensors": _tensors(contents.tensors),
        "files": _files(contents),
    }
    lines = [f"{contents.path}", *(f"  damaged     {sentence}" for sentence in contents.wrong)]
    if contents.wrong:
        lines.append("              so what follows may be wrong, and no run will load it")
    lines += [f"  {name:<12}{text}" for name, text in rows.items()]
    return lines + [f"  {'data' if not n else '':<12}{line}" for n, line in enumerate(_data(contents.run.at("data")))]


def _progress(contents: Contents) -> str:
    steps = contents.config.at("train", "steps").integer
    step = contents.state.at("step").integer
    progress = contents.run.at("progress")
    return (
        f"step {integer(step)}{f' of {steps:,}' if steps else ''}; {integer(progress.at('samples').integer)} samples, "
        f"{integer(progress.at('tokens').integer)} tokens"
    )


def _model(model: Document) -> str:
    if not model.fields:
        return UNKNOWN
    stack = " + ".join(map(_segment, model.at("stack").items))
    hidden, vocabulary = model.at("hidden_size").integer, model.at("vocabulary_size").integer
    return f"{stack}; hidden {integer(hidden)}, vocabulary {integer(vocabulary)}"


def _segment(segment: Document) -> str:
    shared = segment.at("shared_kv")
    if shared.fields:
        return f"[shared K,V {integer(shared.at('kv_heads').integer)} x {integer(shared.at('head_dim').integer)}]"
    return f"{integer(segment.at('layers').integer)} {segment.at('mixer').text or UNKNOWN}"


def _parameters(contents: Contents) -> int | None:
    own = [tensor.elements for tensor in contents.tensors if not tensor.name.startswith(OPTIMIZER)]
    return sum(own) if own else None


def _schedule(contents: Contents) -> str:
    schedule = contents.state.at("scheduler")
    warmup, decay = schedule.at("lr_warmup_steps").integer, schedule.at("lr_decay_steps").integer
    return (
        f"{schedule.at('lr_decay_style').text or UNKNOWN}, learning rate {number(_rate(contents))} now, "
        f"{number(schedule.at('max_lr').number)} to {number(schedule.at('min_lr').number)}; "
        f"{integer(warmup)} warm-up steps, decay until step {integer(decay)}"
    )


def _rate(contents: Contents) -> float | None:
    return contents.state.at("learning_rate").number


def _watch(watch: Document) -> str:
    names = {"skipped": "skipped step", "spikes": "spike", "roll_backs": "roll-back"}
    told = [count(watch.at(key).integer or 0, name) for key, name in names.items()]
    return ", ".join(told) if watch.fields else UNKNOWN


def _tensors(tensors: Sequence[TensorEntry]) -> str:
    optimizer = [tensor for tensor in tensors if tensor.name.startswith(OPTIMIZER)]
    model = [tensor for tensor in tensors if not tensor.name.startswith(OPTIMIZER)]
    return (
        f"{count(len(tensors), 'tensor')}, {size(_bytes(tensors))}: {len(model):,} of the model with "
        f"{size(_bytes(model))}, {len(optimizer):,} of the optimizer with {size(_bytes(optimizer))}"
    )


def _bytes(tensors: Sequence[TensorEntry]) -> int:
    return sum(tensor.bytes for tensor in tensors)


def _files(contents: Contents) -> str:
    pieces = [name for name in contents.sizes if name.endswith(".distcp")]
    others = sorted(name for name in contents.sizes if not name.endswith(".distcp"))
    total = sum(contents.sizes.values())
    return f"{count(len(contents.sizes), 'file')}, {size(total)}: {len(pieces):,} *.distcp, {', '.join(others)}"


def _data(data: Document) -> list[str]:
    if not data.fields:
        return [UNKNOWN]
    consumed, length = data.at("consumed_samples").integer, data.at("sequence_length").integer
    where = (
        f"after {integer(consumed)} samples of {integer(length)} tokens; seed {data.at('seed').integer}, "
        f"{data.at('shuffle').text or UNKNOWN} shuffled, "
        f"{integer(data.at('skipped_samples').integer)} samples replaced"
    )
    return [where, *map(_source, data.at("sources").items)]


def _source(source: Document) -> str:
    return (
        f"{source.at('name').text or UNKNOWN} (fingerprint {source.at('fingerprint').text or UNKNOWN}), weight "
        f"{number(source.at('weight').number)}: {integer(source.at('read').integer)} samples read"
    )


def _listed(tensors: Sequence[TensorEntry], pattern: str) -> list[str]:
    if not tensors:
        return [f"no tensor has a name like {pattern!r}"]
    rows = [(t.name, " x ".join(map(integer, t.shape)) or "one number", t.dtype) for t in tensors]
    return table(("tensor", "shape", "dtype"), rows, right=())


def _document(contents: Contents) -> dict[str, Any]:
    run = contents.run
    return {
        "path": str(contents.path),
        "wrong": list(contents.wrong),
        "written": utc_time(written(contents.path)),
        "format": FORMAT if contents.files else None,
        "step": contents.state.at("step").integer,
        "steps": contents.config.at("train", "steps").integer,
        "samples": run.at("progress", "samples").integer,
        "tokens": run.at("progress", "tokens").integer,
        "model": run.at("model").value,
        "parameters": _parameters(contents),
        "ranks": contents.ranks,
        "layout": contents.layout,
        "compute": run.at("compute").text,
        "learning_rate": _rate(contents),
        "scheduler": contents.state.at("scheduler").value,
        "watch": {key: run.at("watch", key).integer for key in ("skipped", "spikes", "roll_backs")},
        "data": run.at("data").value,
        "tensor_count": len(contents.tensors),
        "tensor_bytes": _bytes(contents.tensors),
        "files": {name: contents.sizes[name] for name in sorted(contents.sizes)},
    }


def _tensor_document(tensor: TensorEntry) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
