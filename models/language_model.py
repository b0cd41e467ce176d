"""The language model, or this rank's pipeline stage of it."""

from __future__ import annotations

import re

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from ..configs.stack import carried_kv, expand
from ..parallel.context import ContextParallel
from ..parallel.linear import Embedding, OutputLayer
from ..parallel.parameters import Law, linear_default
from ..parallel.pipeline import Stage, pack, unpack
from .decoder import Decoder
from .differential_heads import DifferentialHeads
from .flops import head_flops, layer_flops
from .norm import RMSNorm
from .sequences import Sequences
from .site import Site


class LanguageModel(MegatronModule):  # type: ignore[misc]
    """Embedding (first stage), layers, final norm and output layer (last stage).

    A stage in the middle takes the boundary tensor of the stage before it through ``set_input_tensor``, as
    Megatron-Core's schedules expect, and returns the boundary tensor for the next.
    """

    def __init__(
        self, site: Site, split: tuple[int, ...], stage: Stage, context: ContextParallel, chunk: int | None = None
    ) -> None:
        """``stage`` is one of the chunks into which ``split`` cuts the layers; ``chunk`` its number on this rank."""
        super().__init__(config=site.engine)
        model = site.model
        width, rows = model.hidden_size, model.padded_vocabulary()
        self.site, self.split, self.stage, self.context = site, split, stage, context
        # Names that Megatron-Core's schedules and gradient finalisation look for.
        self.vp_stage = chunk
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = stage.has_embedding, stage.has_output
        self.share_embeddings_and_output_weights = model.tied_embeddings
        normal = Law("normal", width**-0.5)
        head = normal if model.head_init == "normal" else linear_default(width)
        self.plans = expand(model.stack)
        self.sends_kv = carried_kv(self.plans, stage.last) is not None
        if stage.has_embedding:
            self.embedding = Embedding(rows, width, normal, site.engine, site.groups)
        self.decoder = Decoder(self.plans[stage.first : stage.last], site)
        if stage.has_output:
            self.final_norm = RMSNorm(site)
            if model.tied_embeddings and not stage.has_embedding:
                self.tied = Embedding(rows, width, normal, site.engine, site.groups)
                self.tied.weight.shared = True
            self.output = OutputLayer(rows, width, None if model.tied_embeddings else head, site.engine, site.groups)
        self._input: Tensor | None = None
        self._mark_tied()

    def set_input_tensor(self, tensor: Tensor | list[Tensor | None] | None) -> None:
        """Receive the boundary tensor of the previous stage; called by the schedules."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, document_start: Tensor | None = None
    ) -> Tensor:
        """Run this stage on whole sequences, of which it takes this context rank's share.

        Args:
            tokens: (B, S) token ids, of which stages after the first take the shape alone.
            labels: (B, S) ids to predict; read by the last stage alone.
            document_start: (B, S) position at which each token's document starts, where documents are kept apart.

        Returns:
            The boundary tensor (S_local, B, W) of a stage that is not the last; else the mean loss over the
            B x S / context size tokens of this context rank, a scalar in fp32, or their logits (S / context size, B,
            vocabulary / tensor size) where no labels are given.
        """
        context = self.context.over(tokens.shape[1])
        x, kv = self._enter(context.share.take(tokens, dim=1), context.share.local_length)
        x, kv = self.decoder(x, kv, Sequences(context, document_start, self.site.recompute != "none"))
        if not self.post_process:
            return make_viewless_tensor(  # type: ignore[no-any-return]
                pack(x, kv if self.sends_kv else None), requires_grad=True, keep_graph=True
            )
        x, weight = self.final_norm(x), self.shared_embedding_or_output_weight()
        if labels is None:
            return self.output(x, weight)  # type: ignore[no-any-return]
        return self.output.loss(x, context.share.take(labels, dim=1).mT, weight)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight held here, whose gradients Megatron-Core sums over the first and last stage."""
        if not self.share_embeddings_and_output_weights:
            return None
        if self.pre_process:
            return self.embedding.weight  # type: ignore[no-any-return]
        return self.tied.weight if self.post_process else None

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward operations of this stage's matrix products per token, over all tensor ranks."""
        model, plans = self.site.model, self.plans[self.stage.first : self.stage.last]
        flops = sum(layer_flops(plan, model, sequence_length) for plan in plans)
        return flops + (head_flops(model) if self.post_process else 0.0)

    def _mark_tied(self) -> None:
        """Tell Megatron-Core of a weight that two stages hold, the last one as a copy (``shared``).

        Both need ``shared_embedding``: it gives the weight a gradient bucket of its own, without which the two
        stages' data-parallel shards of it would not be the same elements.
        """
        weight = self.shared_embedding_or_output_weight()
        if weight is not None:
            weight.shared_embedding = True  # type: ignore[attr-defined]

    def global_name(self, name: str) -> str:
        """The name in the whole model of a parameter of this stage."""
        name = re.sub(r"^decoder\.layers\.(\d+)\.", self._global_layer, name)
        return name.removeprefix("decoder.").replace("tied.weight", "embedding.weight")

    def differential_layers(self) -> dict[int, DifferentialHeads]:
        """The layers of this stage that have a lambda, by global layer index."""
        found = {block.index: getattr(block.mixer, "differential", None) for block in self.decoder.blocks()}
        return {layer: heads for layer, heads in found.items() if heads is not None}

    def _global_layer(self, match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) + self.stage.first}."

    def _enter(self, tokens: Tensor, local_length: int) -> tuple[Tensor, Tensor | None]:
        if self.pre_process:
            x: Tensor = self.embedding(tokens)
            return (x * x.shape[-1] ** 0.5 if self.site.model.embedding_scale else x), None
        if self._input is None:
            raise RuntimeError("a pipeline stage ran before it received its input")
        return unpack(self._input, self.site.model.hidden_size, local_length)
