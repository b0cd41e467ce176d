"""The typed configuration of a run: what may be written in a YAML recipe or overridden on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from .durations import Duration
from .stack import Section, Stack

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""As many as torch's generators and the data's permutations take."""


def _split_tag(value: object) -> str:
    """Tell the union of pipeline splits which member a value is meant to be, so that errors speak of that one alone."""
    return "layers" if isinstance(value, list | tuple) else "rule"


PipelineSplit = Annotated[
    Annotated[Literal["balanced", "even"], Tag("rule")] | Annotated[tuple[PositiveInt, ...], Tag("layers")],
    Discriminator(_split_tag),
]


class Model(Section):
    """What is trained."""

    vocabulary_size: PositiveInt | None = None
    """Number of token ids; by default that of the prepared data."""
    vocabulary_multiple: PositiveInt = 128
    """The embedding has its rows rounded up to a multiple of this, whatever the layout."""
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    ffn_activation: Literal["swiglu", "gelu"] = "swiglu"
    """``swiglu``: fc2(silu(fc1 x) * gate x); ``gelu``: fc2(gelu(fc1 x)), the RetNet paper's."""
    stack: Stack
    norm_eps: PositiveFloat = 1e-5
    tied_embeddings: bool = False
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(hidden_size), as RetNet and YOCO do."""
    head_init: Literal["linear", "normal"] = "linear"
    """Output layer: ``linear`` U(+-D^-0.5) as YOCO, ``normal`` N(0, D^-0.5) as RetNet."""

    def padded_vocabulary(self) -> int:
        """Rows of the embedding. Needs ``vocabulary_size`` to be known."""
        if self.vocabulary_size is None:
            raise ValueError("model.vocabulary_size is not known yet")
        multiple = self.vocabulary_multiple
        return -(-self.vocabulary_size // multiple) * multiple


class Parallel(Section):
    """How the model is divided. The data-parallel size is what remains of the world size."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks held by each pipeline stage; above 1 the schedule is interleaved 1F1B."""
    pipeline_split: PipelineSplit = "balanced"
    """Layers of each of the ``pipeline`` x ``virtual_pipeline`` chunks: ``balanced`` by operations (the output layer
    counted with the last chunk), ``even``, or a list of their numbers in the order of the model."""
    context: PositiveInt = 1
    """Ranks over which each sequence is divided; ``context_order`` says how."""
    context_exchange: Literal["gather", "all_to_all"] = "gather"
    """How softmax mixers meet the keys of other context ranks: ``gather`` K,V of the whole sequence, or
    ``all_to_all`` between tokens and heads. Windows, retention and shared K,V have exchanges of their own."""
    sequence: bool = False
    """Sequence parallelism: activations between the sharded regions are split along the sequence over tensor ranks."""

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class RampStage(Section):
    """A part at the start of a run in which something differs from the rest."""

    until_samples: PositiveInt
    """It holds for steps that begin with fewer consumed samples than these."""


class BatchStage(RampStage):
    """Another global batch at the start of a run."""

    global_batch_size: PositiveInt


class SequenceStage(RampStage):
    """Shorter sequences at the start of a run."""

    sequence_length: PositiveInt
    """A divisor of ``train.sequence_length``: windows are cut into sequences of this length, so that no token is left
    out and a step keeps its tokens."""


class Train(Section):
    """How long and in what batches."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    """Samples of a step over all ranks."""
    batch_ramp: tuple[BatchStage, ...] = ()
    """Batch sizes before ``global_batch_size``, in their order."""
    micro_batch_size: PositiveInt = 1
    sequence_length: PositiveInt
    """Tokens of a sample."""
    sequence_ramp: tuple[SequenceStage, ...] = ()
    """Sequence lengths before ``sequence_length``, in their order."""
    document_masking: bool = False
    """Whether tokens see their own document alone: attention is masked and recurrent state starts anew at each
    document. Off, as in the papers, a window is one text."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those between the matrix products
    (``selective``) or all but each layer's input (``full``)."""
    seed: Seed = 1234
    deterministic: bool = False
    """Use only kernels that give the same bits every time; on a GPU that costs speed, on a CPU nothing changes."""
    max_wall_time: Duration | None = None
    """Save and stop after this long: seconds, or text such as ``90m``, ``23h30m`` or ``1d12h``. The step, evaluation or
    save that is running then is finished first, so leave room before a hard limit."""


class Optimizer(Section):
    """AdamW and its learning-rate schedule. Matrices decay; vectors (norms, lambda) do not."""

    learning_rate: PositiveFloat = 3e-4
    minimum_learning_rate: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    """Steps until the minimum is reached (warm-up included); by default ``train.steps``."""
    wsd_decay_steps: PositiveInt | None = None
    """Length of the final decay of ``wsd``; by default a tenth of ``decay_steps``."""

    def wsd_decay(self, decay_steps: int) -> int:
        """Length of the final decay in a schedule of ``decay_steps``."""
        return self.wsd_decay_steps or max(1, decay_steps // 10)


class Fp8(Section):
    """8-bit operands in the linear maps of mixers and feed-forwards, with the sums in fp32."""

    backend: Literal["te", "scaled_mm", "emulate"]
    """``te``: Transformer Engine; ``scaled_mm``: torch's own product; ``emulate``: the same rounding without 8-bit
    hardware, on any device and slowly."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Where scales come from: one per tensor, from the last steps or from the tensor itself, or one per block."""
    keep_first_last_bf16: NonNegativeInt = 0
    """Layers at each end of the model whose linear maps stay in ``precision.compute``."""
    shadow_interval: NonNegativeInt = 100
    """Steps between comparisons of the loss with that of the same microbatches without FP8, each of which costs a
    forward pass; 0 turns them off."""

    def covers(self, layer: int, layers: int) -> bool:
        """Whether layer ``layer``, counted from 0, of a model of ``layers`` has 8-bit operands."""
        return self.keep_first_last_bf16 <= layer < layers - self.keep_first_last_bf16


class Precision(Section):
    """Numbers the model computes with. Master weights and optimizer state are always fp32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    fp8: Fp8 | None = None
    """8-bit operands of linear maps; off by default."""


class Kernels(Section):
    """How the mixers are computed."""

    backend: Literal["auto", "reference", "torch", "triton"] = "auto"
    """``auto``: the fastest on this device; ``torch``: in blocks; ``triton``: fused, on a GPU; ``reference``: the
    papers' formulas, whose memory grows with the square of the sequence."""


class DataSource(Section):
    """One part of a mixture."""

    directory: str
    """A folder of prepared data, or the http(s):// or s3:// URL of one."""
    weight: PositiveFloat
    """Share of the samples, relative to the other weights."""


class Data(Section):
    """Prepared token shards: one folder, or a mixture of several."""

    directory: str | None = None
    """A folder of prepared data, or the http(s):// or s3:// URL of one."""
    sources: tuple[DataSource, ...] = ()
    """The mixture, instead of ``directory``."""
    cache: Path | None = None
    """Where parts of remote shards are kept; by default ``~/.cache/trine``. Only used for URLs."""
    shuffle: Literal["windows", "blocks"] = "windows"
    """``windows`` shuffles all windows among each other; ``blocks`` shuffles runs of 1,024 windows and then the windows
    of every 64 runs, so that remote and slow disks are read in long pieces."""
    workers: NonNegativeInt = 2
    """Threads per rank that read ahead of training; 0 reads within the step."""
    read_ahead: PositiveInt = 16
    """Microbatches per rank that are read ahead."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What a damaged sample does: end the run, or be replaced by another one, the same on every rank."""
    damage_budget: PositiveInt = 100
    """Replaced samples with which ``skip`` ends the run as well."""
    on_change: Literal["refuse", "accept"] = "refuse"
    """Whether a run may continue with other data, weights, seed or sequence length than its checkpoint had."""
    record_samples: bool = False
    """Write the ids of the samples that every step read to ``samples/`` in the run's folder."""

    @property
    def mixture(self) -> tuple[DataSource, ...]:
        """The sources, of which a single ``directory`` is one."""
        return self.sources or (DataSource(directory=self.directory or "", weight=1.0),)


class Evaluation(Section):
    """Validation loss on the held-out split."""

    interval: NonNegativeInt = 100
    """Steps between evaluations; 0 turns them off. A run that evaluates does so at its start and end too."""
    batches: PositiveInt = 8
    """Global batches per evaluation, the same ones every time."""


class Checkpoint(Section):
    """Sharded checkpoints."""

    directory: Path | None = None
    """By default ``checkpoints`` in the run's directory."""
    interval: NonNegativeInt = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep: PositiveInt = 3
    """How many of the newest checkpoints stay on disk."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are multiples of this stay for good; 0 keeps none for good."""
    background: bool = True
    """Write files while training goes on; else training waits for them."""
    on_damage: Literal["fall_back", "stop"] = "fall_back"
    """What a damaged newest checkpoint does when a run begins: the one before it is used, or the run ends."""
    on_failure: Literal["continue", "stop"] = "continue"
    """What a save that fails, on a full disk say, does to the run. The last one of a run must succeed."""
    failure_budget: PositiveInt = 3
    """Failed saves in a row with which ``continue`` ends the run as well."""


class Watch(Section):
    """What a run does about numbers and ranks that go wrong."""

    on_nonfinite: Literal["skip", "roll_back", "stop"] = "skip"
    """What a loss or gradient norm that is not finite does: its step changes no parameter, or the run goes back to the
    newest checkpoint and leaves out the samples since then, or it ends."""
    on_spike: Literal["accept", "skip", "roll_back", "stop"] = "accept"
    """The same for a loss or gradient norm far above the recent ones; ``accept`` only counts it."""
    spike_deviations: PositiveFloat = 6.0
    """A spike lies this many standard deviations above the mean of the last ``spike_window`` accepted steps."""
    spike_window: Annotated[int, Field(ge=4)] = 128
    """Steps that a spike is measured against; before there are as many, none is found."""
    skip_budget: PositiveInt = 10
    """Skipped steps in a row with which the run ends."""
    roll_back_budget: PositiveInt = 3
    """Times that a run may go back in all."""
    rerun_nonfinite: bool = True
    """Compute a step that is not finite a second time before it is judged: a fault of the hardware does not repeat."""
    hang_seconds: NonNegativeFloat = 300.0
    """A rank that makes no progress for this long is named, and the run ends; 0 turns the watch off."""
    collective_timeout: PositiveFloat = 600.0
    """Seconds after which torch gives up waiting for other ranks; ``hang_seconds`` must be 40 less."""
    straggler_interval: NonNegativeInt = 10
    """Steps between measurements of how the ranks' own work spreads; 0 turns them off."""
    straggler_ratio: Annotated[float, Field(gt=1.0)] = 1.5
    """A rank whose own work takes this many times the median is named."""


def _whole(value: object) -> object:
    """Numbers as DeepSpeed's users write them: YAML takes 5e8 for text."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]*)?[eE][0-9]{1,2}", value):
        return float(value)
    return value


Elements = Annotated[PositiveInt, BeforeValidator(_whole)]
ElementsOrNone = Annotated[NonNegativeInt, BeforeValidator(_whole)]


class Offload(Section):
    """Where DeepSpeed keeps what a rank owns."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = False
    """Whether that memory is locked, so that GPUs copy from it faster."""


class ZeroOptimization(Section):
    """DeepSpeed's ``zero_optimization``, under its own names; what is left out takes DeepSpeed's default."""

    stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What is divided over data and context ranks: nothing (0), the optimizer's state (1), gradients, too (2), and
    parameters, too (3)."""
    offload_optimizer: Offload | None = None
    """Optimizer state, and its update, in host memory. From stage 1 on."""
    offload_param: Offload | None = None
    """Parameters in host memory between uses. At stage 3."""
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    reduce_bucket_size: Elements | None = None
    allgather_partitions: bool | None = None
    allgather_bucket_size: Elements | None = None
    round_robin_gradients: bool | None = None
    sub_group_size: Elements | None = None
    stage3_max_live_parameters: Elements | None = None
    stage3_max_reuse_distance: Elements | None = None
    stage3_prefetch_bucket_size: ElementsOrNone | None = None
    stage3_param_persistence_threshold: ElementsOrNone | None = None
    stage3_model_persistence_threshold: ElementsOrNone | None = None


class DeepSpeed(Section):
    """What DeepSpeed's own configuration adds to this one, under its own names."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    communication_data_type: Literal["fp32", "bf16"] | None = None
    """Type in which gradients are summed over ranks; by default fp32."""


class Run(Section):
    """Where the run writes."""

    directory: Path


class Config(Section):
    """A whole run."""

    model: Model
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """Who divides the optimizer: Megatron-Core, in every layout; or DeepSpeed's ZeRO without pipeline stages, which can
    divide gradients and parameters, too, and keep them in host memory."""
    deepspeed: DeepSpeed | None = None
    """Settings of ``engine: deepspeed``."""
    parallel: Parallel = Parallel()
    train: Train
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    data: Data
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    watch: Watch = Watch()
    run: Run

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage, of a run by DeepSpeed."""
        return (self.deepspeed or DeepSpeed()).zero_optimization.stage

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints are written and looked for."""
        return self.checkpoint.directory or self.run.directory / "checkpoints"
