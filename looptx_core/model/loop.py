"""The looped transformer: prelude, a core that is iterated, coda.

    tokens -> embedding -> prelude -> e
    state 0 = e
    state t = core(inject(state t-1, e))        for t = 1 .. loops
    logits  = head(norm(coda(state t)))         for any t

Every state can be read out, and the state after t loops never depends on how many follow: the
initial state is the prelude's output and not random, and nothing is scaled by the depth. Early
exit, loss-triggered training and speculation all rest on that.

The shape (prelude, core, coda) is Huginn's (arXiv 2502.05171); the injection is Parcae's (arXiv
2604.12946): a per-channel decay below 1 on the normalised state, plus the normalised embedding.
With `injection="none"` one loop is an ordinary pre-norm decoder, and with no prelude and no coda
the whole stack is looped. With `"streams"` a state is several residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.media.base import Encoded
from looptx_core.media.batch import Layout, Media, lay_out
from looptx_core.media.registry import MEDIA, media_for
from looptx_core.model.attention import (
    Attend,
    VarlenBatch,
    sdpa,
    takes_documents,
    with_groups,
    within_documents,
)
from looptx_core.model.block import Block, ForwardContext, FusedProjection
from looptx_core.model.cache import CacheView, LoopCache
from looptx_core.model.code_rows import AllCodeRows
from looptx_core.model.confidence import Confidence, ConfidenceHead
from looptx_core.model.initial import initialise
from looptx_core.model.injection import Injection, read_out
from looptx_core.model.layer_state import KVState, LayerState, StateSpec
from looptx_core.model.local import with_local
from looptx_core.model.memory import window_mask
from looptx_core.model.memory_state import MemoryState, WindowState
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_tables
from looptx_core.model.score import Score, score
from looptx_core.model.segments import iterate_blocks
from looptx_core.model.vocabulary import new_embedding, new_head, tie_head
from looptx_core.model.weights import compute_dtype


class LoopOutput(NamedTuple):
    """logits: (batch, length, vocab_size); state: (batch, length, config.state_width)."""

    logits: Tensor
    state: Tensor
    confidence: Confidence


Step = Callable[[Tensor, Tensor, int, ForwardContext], Tensor]
"""(state, embedding, loop, context) -> the state after that loop."""


class LoopedTransformer(nn.Module):
    """A decoder whose core blocks are iterated. See the module's docstring for the equations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = sdpa
        # Called with the loop before each iteration, so that a loop can switch to its own weights.
        self.enter_loop: Callable[[int], object] | None = None
        self.embedding = new_embedding(config)
        self.media = media_for(config)
        for medium in self.media:
            if (encoder := medium.encoder(config)) is not None:
                self.add_module(medium.encoder_name, encoder)
        local = map(config.local_attention.has, count())  # layer after layer

        def blocks(layers: int, remembers: bool = False) -> nn.ModuleList:
            return nn.ModuleList(Block(config, remembers, next(local)) for _ in range(layers))

        self.prelude = blocks(config.prelude_layers)
        self.injection = Injection(config)
        self.core = blocks(config.core_layers, config.has_memory)
        self.coda = blocks(config.coda_layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = new_head(config)
        tie_head(self)
        self.code_rows: AllCodeRows | None = None
        self.confidence = ConfidenceHead(config)
        for medium in self.media:
            if (head := medium.head(config)) is not None:
                self.add_module(medium.head_name, head)
        initialise(self)

    # The parts of a forward pass. The engine and the trainer use them one by one.

    def context(
        self,
        length: int,
        view: CacheView | None = None,
        documents: Tensor | None = None,
        layout: Layout | None = None,
    ) -> ForwardContext:
        """Positions and mask for `length` tokens of a batch, or for a view of a cache.

        documents: (batch, length), the number of each token's document; a token attends only
        within its own. Positions do not restart with a document, since RoPE sees distances alone.
        layout: where items of media are among the tokens, from `lay_out`; with a cache, they go
        on from where its rows stand.
        """
        weight = self.norm.weight  # has the activations' type, which a quantised matrix has not
        mask: Tensor | VarlenBatch | None = None
        if view is None:
            positions = torch.arange(length, device=weight.device)[None, None]
            # Rows of a single document need no mask, and causal attention is half the work.
            if documents is None or not bool((documents != documents[:, :1]).any()):
                documents = None
            if self.config.has_memory:
                groups = None if layout is None else layout.groups
                mask = window_mask(length, self.config, weight.device, documents, groups)
            elif documents is not None:
                takes_varlen = layout is None and takes_documents(self.attend, weight)
                mask = VarlenBatch.of(documents) if takes_varlen else within_documents(documents)
        else:
            positions, mask = view.positions()[None], view.mask()
        if layout is not None:
            before = positions[..., :1]  # of the first new token
            positions = layout.positions if view is None else layout.positions + before
            if view is not None:
                view.set_positions(layout.ends + before[0, :, 0])
            if layout.groups is not None:
                assert not isinstance(mask, VarlenBatch)
                if view is not None:
                    mask = view.with_groups(mask, layout.groups)
                elif not self.config.has_memory:
                    mask = with_groups(mask, layout.groups)
        if view is not None:
            view.keep_positions(positions)
        rotary = rotary_tables(
            positions, self.config.head_dim, self.config.rope_theta, compute_dtype(weight),
            self.config.scaled_rope, far=self.config.has_memory,
        )  # fmt: skip
        kept = documents if self.config.has_memory else None
        ctx = ForwardContext(rotary, mask, self.attend, view, documents=kept)
        return with_local(ctx, self.config, positions, length)

    def encode(self, media: Media | None) -> dict[str, Encoded]:
        """What the encoder of each medium makes of its items."""
        encoders = self.encoders()
        return {name: MEDIA[name].encode(encoders[name], b) for name, b in (media or {}).items()}

    def embed(
        self,
        tokens: Tensor,
        ctx: ForwardContext,
        media: Media | None = None,
        encoded: Mapping[str, Encoded] | None = None,
    ) -> Tensor:
        """tokens (batch, length) -> the prelude's output (batch, length, d_model).

        media, encoded: see `look_up`.
        """
        return self.run_prelude(self.look_up(tokens, media, encoded), ctx)

    def look_up(
        self,
        tokens: Tensor,
        media: Media | None = None,
        encoded: Mapping[str, Encoded] | None = None,
    ) -> Tensor:
        """tokens (batch, length) -> what the prelude reads (batch, length, d_model).

        Encoded items of media replace the embeddings of their placeholder tokens, in order.
        encoded: from `encode`, if that was called before.
        """
        x = self.embedding(tokens)
        if self.code_rows is not None:
            x = x + self.code_rows.embed(tokens).to(x.dtype)
        for name, read in (self.encode(media) if encoded is None else encoded).items():
            places = tokens == MEDIA[name].token(self.config)
            x = x.masked_scatter(places[..., None], read.vectors.to(x.dtype))
        return x

    def run_prelude(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """The prelude on what `look_up` returned."""
        view = ctx.view
        for layer, block in enumerate(self.prelude):
            x = block(x, ctx, view and view.prelude(layer))
        return x

    def step(
        self, state: Tensor, embedding: Tensor, loop: int | Tensor, ctx: ForwardContext
    ) -> Tensor:
        """One iteration of the core: the state after `loop`, counted from 1.

        A tensor of loops, (batch,), gives each row its own: all rows share the weights, and only
        the cache slots differ.
        """
        if self.enter_loop:
            assert isinstance(loop, int), "loops with weights of their own are run one by one"
            self.enter_loop(loop)
        x, view = self.injection(state, embedding, loop), ctx.segment or ctx.view
        for layer, block in enumerate(self.core):
            x = block(x, ctx, view and view.core(layer, loop))
        return self.injection.after(state, embedding, x, loop)

    def iterate(
        self,
        state: Tensor,
        embedding: Tensor,
        ctx: ForwardContext,
        loops: range,
        step: Step | None = None,
        running: Callable[[int], int] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the core: yields (loop, the state after it) for each of `loops`, counted from 1.

        Everything that runs several loops uses this generator.

        state: after the loop before `loops.start`; the prelude's output if that is 1. step: runs
        in place of `self.step`, such as one with gradient checkpointing. running: gives, for a
        loop, how many of the first rows still run; the others are dropped. Not with a cache. Where
        none is left the first runs on, unread, as sharded weights need all ranks at each loop.
        """
        step = step or self.step
        state = self.injection.open(state) if loops.start == 1 else state
        if self.config.has_memory and ctx.view is None:
            yield from iterate_blocks(self, state, embedding, ctx, loops, step, running)
            return
        for loop in loops:
            if running is not None:
                rows = slice(max(running(loop), 1))
                state, embedding, ctx = state[rows], embedding[rows], ctx.rows(rows)
            state = step(state, embedding, loop, ctx)
            yield loop, state

    def backfill(self, state: Tensor, embedding: Tensor, loop: int, ctx: ForwardContext) -> None:
        """Write the keys and values that later, deeper tokens will attend to.

        The view's tokens exit after `loop`. To be called only where `LoopCache.needs_backfill`.
        """
        assert ctx.view is not None
        if self.enter_loop:
            self.enter_loop(loop + 1)
        first, x = self.core[0], self.injection(state, embedding, loop + 1)
        assert isinstance(first, Block)
        ctx.view.backfill(loop, first.entries(x, ctx))

    def new_layer_state(self, spec: StateSpec) -> LayerState:
        """What a layer remembers while decoding; a subclass may return another kind of memory."""
        if not self.config.has_memory:
            return KVState(spec)
        if spec.part != "core":
            return WindowState(spec)
        block = self.core[spec.layer]
        assert isinstance(block, Block) and block.attention.memory is not None
        return MemoryState(spec, block.attention.memory)

    def new_cache(
        self, batch: int, capacity: int, loops: int, policy: str = "fill", kind: str = "float"
    ) -> LoopCache:
        """An empty cache of this model's type and on its device, see `LoopCache`."""
        weight = self.norm.weight
        return LoopCache(
            self.config,
            batch,
            capacity,
            loops,
            policy=policy,
            kind=kind,
            dtype=weight.dtype,
            device=weight.device,
            new_state=self.new_layer_state,
        )

    def coda_hidden(self, state: Tensor, ctx: ForwardContext) -> Tensor:
        """Coda and final norm: a loop's state -> what the head reads, (batch, length, d_model)."""
        x, view = read_out(state, self.config.d_model), ctx.view
        for layer, block in enumerate(self.coda):
            x = block(x, ctx, view and view.coda(layer))
        return self.norm(x)

    def logits(self, decoded: Tensor) -> Tensor:
        """The head on `coda_hidden`'s output, (..., d_model) -> (..., vocab_size)."""
        logits = self.head(decoded)
        if self.code_rows is not None:
            logits = logits + self.code_rows.logits(decoded, logits.shape[-1])
        return logits

    def score(self, decoded: Tensor, targets: Tensor) -> Score:
        """Score the head. decoded: `coda_hidden`'s, (tokens, d_model). targets: (tokens,) ids."""
        return score(self.logits(decoded), targets)

    def states(
        self,
        tokens: Tensor,
        loops: int,
        ctx: ForwardContext | None = None,
        media: Media | None = None,
    ) -> Iterator[Tensor]:
        """The state after each of the loops 1..loops."""
        ctx = ctx or self.context(tokens.shape[1])
        embedding = self.embed(tokens, ctx, media)
        for _, state in self.iterate(embedding, embedding, ctx, range(1, loops + 1)):
            yield state

    def forward(
        self,
        tokens: Tensor,
        loops: int | None = None,
        cache: LoopCache | None = None,
        media: Media | None = None,
    ) -> LoopOutput:
        """Run a fixed number of loops and read out the last.

        tokens: (batch, length) ids. loops: `config.loops` by default. cache: the tokens continue
        it, and it is advanced; all of its tokens run so many loops. media: the items for the
        placeholders among these tokens.
        """
        loops = loops or self.config.loops
        assert loops >= 1, "at least one loop"
        outputs = []
        if cache is not None:
            cache.deepest = [loops] * len(cache.deepest)
        for x, ctx in self.passes(tokens, cache, media=media):
            state = embedding = self.run_prelude(x, ctx)
            for _, after in self.iterate(state, embedding, ctx, range(1, loops + 1)):
                state = after
            outputs.append((self.logits(self.coda_hidden(state, ctx)), state))
            if ctx.view is not None:
                ctx.view.advance()
        logits, state = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                         for parts in zip(*outputs))  # fmt: skip
        return LoopOutput(logits, state, self.confidence(state, loops))

    def passes(
        self,
        tokens: Tensor,
        cache: LoopCache | None,
        rows: Sequence[int] | None = None,
        media: Media | None = None,
    ) -> Iterator[tuple[Tensor, ForwardContext]]:
        """What the prelude reads, (rows, new, d_model), and the context of each pass over a text.

        A model with a memory fills a cache block by block, all others do in one pass; each pass has
        to be finished, and the cache advanced, before the next is asked for.

        tokens: (rows, length). rows: of the cache, by default all. media: see `forward`.
        """
        padding = cache.start if cache is not None and cache.padded else None
        layout = self.layout(tokens, media, padding)
        if cache is None:
            yield self.look_up(tokens, media), self.context(tokens.shape[1], layout=layout)
            return
        whole = self.look_up(tokens, media) if media else None
        for columns in cache.parts(tokens.shape[1], rows):
            x = self.look_up(tokens[:, columns]) if whole is None else whole[:, columns]
            view, part = cache.view(x.shape[1], rows), layout and layout.part(columns)
            yield x, self.context(x.shape[1], view, layout=part)

    def layout(
        self, tokens: Tensor, media: Media | None, padding: Tensor | None = None
    ) -> Layout | None:
        """Positions of tokens and items of media; None for text alone, which counts 0, 1, 2, ..."""
        return lay_out(tokens, media, self.config, padding) if media else None

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder of each medium that the model reads."""
        return self._modules_of("encoder_name")

    def heads(self) -> dict[str, nn.Module]:
        """The head of each medium that has an objective of its own here."""
        return self._modules_of("head_name")

    def _modules_of(self, role: str) -> dict[str, nn.Module]:
        found = {m.name: self._modules.get(getattr(m, role)) for m in self.media}
        return {name: module for name, module in found.items() if module is not None}

    def vocabulary(self) -> list[Tensor]:
        """The matrices that have a row for each token."""
        tied = self.head.weight is self.embedding.weight
        return [self.embedding.weight] if tied else [self.embedding.weight, self.head.weight]

    def fuse_projections(self) -> None:
        """Prepare for decoding: projections of the same input become one matrix product."""
        for module in self.modules():
            if isinstance(module, FusedProjection):
                module.fuse_projections()

    def trunk_parameters(self) -> list[nn.Parameter]:
        """All parameters except the confidence head's."""
        own = {id(p) for p in self.confidence.parameters()}
        return [p for p in self.parameters() if id(p) not in own]
