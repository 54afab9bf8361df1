"""A looped model at a fixed depth as one ONNX graph, whose weights stand in it once.

The loops are unrolled and share the core's weights, so the file hardly grows with the depth. Its
inputs and outputs have the names that onnxruntime-genai looks for, as Optimum and transformers.js
do:

    input_ids        (batch, new) int64
    attention_mask   (batch, seen + new) int64, 0 for padding on the left
    position_ids     (batch, new) int64, counted from 0 at the first token of a row
    past_key_values.N.key, .value    (batch, kv_heads, seen, head_dim) float32
    logits           (batch, new, vocab_size) float32
    present.N.key, .value            (batch, kv_heads, seen + new, head_dim) float32

N counts the prelude's layers, then the core's in each loop, then the coda's: every loop has keys
and values of its own, the policy `fill` of `looptx_core.model.layer_state`. All operators are of
the ONNX standard.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import looptx_core
from looptx_core.model.block import Attention, Block
from looptx_core.model.injection import Injection
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import AllHeadsNorm, HeadNorm, RMSNorm
from looptx_core.model.rope import rotary_frequencies

OPSET, IR_VERSION = 17, 8
"""Those that onnxruntime reads since 1.13, and onnxruntime-web."""
_FAR = float(np.finfo(np.float32).min)


def build_graph(model: LoopedTransformer, loops: int, *, shared_table: bool = True) -> Any:
    """The `onnx.ModelProto` of a float model that runs `loops` loops.

    shared_table: a head that is tied to the embedding is this table turned, rather than a matrix of
    its own, which a quantiser can read.
    """
    return _Graph(model, loops, shared_table).build()


def cache_names(layers: int, prefix: str) -> list[str]:
    """The names of the keys and values of all layers; prefix: past_key_values or present."""
    return [f"{prefix}.{n}.{part}" for n in range(layers) for part in ("key", "value")]


class _Context(NamedTuple):
    """What layers of one kind share: the mask, added to the scores, and the rotary tables."""

    mask: str
    cos: str
    sin: str


class _Graph:
    """Nodes and weights under construction. The methods take and return names of tensors."""

    def __init__(self, model: LoopedTransformer, loops: int, shared_table: bool) -> None:
        self.model, self.config, self.loops = model, model.config, loops
        self.layers = model.config.effective_layers(loops)
        self.shared_table = shared_table and model.config.tie_embeddings
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.nodes: list[Any] = []
        self.stored: dict[str, Any] = {}
        self.layer = 0

    def build(self) -> Any:
        model, config = self.model, self.config
        self.prepare()
        state = self.op("Gather", self.weight(model.embedding.weight), "input_ids")
        state = self.stack(model.prelude, state)
        embedding = state
        for loop in range(1, self.loops + 1):
            made = self.stack(model.core, self.inject(model.injection, state, embedding, loop))
            if model.injection.kind == "half_steps" and loop > 1:
                made = self.mean(state, self.mean(self.mean(embedding, state), made))
            state = made
        state = self.norm(self.stack(model.coda, state), model.norm)
        if self.shared_table:
            table = self.op("Transpose", self.weight(model.embedding.weight), perm=[1, 0])
        else:
            table = self.weight(model.head.weight, turned=True)
        self.op("MatMul", state, table, out="logits")

        cache = ["batch", config.n_kv_heads, "{}", config.head_dim]
        past, present = ([part.format(length) if isinstance(part, str) else part for part in cache]
                         for length in ("seen", "seen + new"))  # fmt: skip
        inputs = [
            _value("input_ids", ["batch", "new"], TensorProto.INT64),
            _value("attention_mask", ["batch", "seen + new"], TensorProto.INT64),
            _value("position_ids", ["batch", "new"], TensorProto.INT64),
            *(_value(name, past) for name in cache_names(self.layers, "past_key_values")),
        ]
        outputs = [
            _value("logits", ["batch", "new", config.vocab_size]),
            *(_value(name, present) for name in cache_names(self.layers, "present")),
        ]
        graph = helper.make_graph(
            self.nodes, f"looptx, {self.loops} loops", inputs, outputs, [*self.stored.values()]
        )
        return helper.make_model(
            graph, producer_name="looptx", producer_version=looptx_core.__version__,
            opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        )  # fmt: skip

    def prepare(self) -> None:
        """What layers share, those of the whole text and local ones."""
        new, whole = self.length("input_ids"), self.length("attention_mask")
        zero, one = self.const(0), self.const(1)
        columns = self.op("Range", zero, whole, one)
        own = self.op("Range", self.op("Sub", whole, new), whole, one)
        own = self.op("Unsqueeze", own, self.const([1]))
        earlier = self.op("Cast", "attention_mask", to=TensorProto.BOOL)
        earlier = self.op("Unsqueeze", earlier, self.const([1]))
        seen = self.op("And", self.op("LessOrEqual", columns, own), earlier)
        # Padding attends to itself, so that no row of the softmax is empty.
        seen = self.op("Or", seen, self.op("Equal", columns, own))
        config, local = self.config, self.config.local_attention
        places = self.op("Cast", "position_ids", to=TensorProto.FLOAT)
        places = self.op("Unsqueeze", places, self.const([2, 3]))
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.scaled_rope)
        self.everywhere = _Context(self.mask(seen), *self.rotary(places, frequencies, "rotary"))
        if local.window:
            near = self.op("Less", self.op("Sub", own, columns), self.const(local.window))
            frequencies = rotary_frequencies(config.head_dim, local.rope_theta)
            tables = self.rotary(places, frequencies, "local rotary")
            self.near = _Context(self.mask(self.op("And", seen, near)), *tables)

    def mask(self, seen: str) -> str:
        """What is added to the scores; seen: (batch, new, columns)."""
        seen = self.op("Unsqueeze", seen, self.const([1, 2]))
        return self.op("Where", seen, self.const(0.0), self.const(_FAR))

    def rotary(self, places: str, frequencies: Tensor, name: str) -> tuple[str, str]:
        """Cosines and signed sines; places: (batch, new, 1, 1)."""
        self.stored[name] = numpy_helper.from_array(frequencies.numpy(), name)
        angles = self.op("Mul", places, name)
        cos, sin = self.op("Cos", angles), self.op("Sin", angles)
        signed = self.op("Concat", self.op("Neg", sin), sin, axis=-1)
        return self.op("Concat", cos, cos, axis=-1), signed

    def length(self, name: str) -> str:
        """The size of a second dimension, as a number."""
        return self.op("Gather", self.op("Shape", name), self.const(1))

    def stack(self, blocks: nn.ModuleList, x: str) -> str:
        """Some blocks, each with the next pair of keys and values."""
        for block in blocks:
            assert isinstance(block, Block)
            x = self.block(x, block)
            self.layer += 1
        return x

    def inject(self, injection: Injection, state: str, embedding: str, loop: int) -> str:
        """What the core reads at a loop; see `Injection`."""
        if injection.kind == "none":
            return state
        if injection.kind == "norm":
            if loop == 1:
                scale = injection.embedding_scale.detach()
                return self.op("Mul", embedding, self.weight(injection.gain, value=scale))
            return self.norm(state, injection.state_norm)
        if injection.kind == "half_steps":
            return embedding if loop == 1 else self.mean(embedding, state)
        if injection.kind == "bridge":
            if loop == 1:
                return embedding
            later = self.linear(self.norm(state, injection.state_norm), injection.bridge)
            return self.op("Add", embedding, later)
        state = self.norm(state, injection.state_norm)
        embedding = self.norm(embedding, injection.embedding_norm)
        if injection.kind == "decay":
            kept = torch.sigmoid(-injection.decay.detach())
            state = self.op("Mul", state, self.weight(injection.decay, value=kept))
            embedding = self.op("Mul", embedding, self.weight(injection.gain))
        return self.op("Add", state, embedding)

    def mean(self, a: str, b: str) -> str:
        return self.op("Mul", self.op("Add", a, b), self.const(0.5))

    def block(self, x: str, block: Block) -> str:
        self.context = self.near if block.local else self.everywhere
        parts = (
            (block.attention_norm, block.attention_post_norm,
             lambda y: self.attention(y, block.attention)),
            (block.mlp_norm, block.mlp_post_norm, lambda y: self.mlp(y, block.mlp)),
        )  # fmt: skip
        for norm, post_norm, part in parts:
            if block.norms_after:
                x = self.op("Add", x, self.norm(part(x), norm))
                continue
            made = part(self.norm(x, norm))
            if isinstance(post_norm, RMSNorm):
                made = self.norm(made, post_norm)
            x = self.op("Add", x, made)
        return x

    def mlp(self, x: str, mlp: Any) -> str:
        gate, up = self.linear(x, mlp.gate_proj), self.linear(x, mlp.up_proj)
        if self.config.activation == "silu":
            gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        else:
            if self.config.activation == "gelu_tanh":
                cube = self.op("Mul", self.op("Pow", gate, self.const(3.0)), self.const(0.044715))
                inner = self.op(
                    "Mul", self.op("Add", gate, cube), self.const(math.sqrt(2 / math.pi))
                )
                tail = self.op("Tanh", inner)
            else:
                tail = self.op("Erf", self.op("Div", gate, self.const(math.sqrt(2))))
            gate = self.op("Mul", self.op("Mul", gate, self.op("Add", tail, self.const(1.0))),
                           self.const(0.5))  # fmt: skip
        return self.linear(self.op("Mul", gate, up), mlp.down_proj)

    def attention(self, x: str, attention: Attention) -> str:
        """Queries are (batch, kv_heads, group, new, head_dim): those that share a key head lie
        together, and the product broadcasts over them."""
        config = self.config
        groups, width = config.n_heads // config.n_kv_heads, config.head_dim
        queries = self.heads(x, attention.q_proj, attention.q_bias, attention.q_norm)
        keys = self.heads(x, attention.k_proj, attention.k_bias, attention.k_norm)
        values = self.heads(x, attention.v_proj, attention.v_bias, None)
        keys, values = (
            self.op("Concat", f"past_key_values.{self.layer}.{part}", new, axis=2,
                    out=f"present.{self.layer}.{part}")
            for part, new in (("key", keys), ("value", values))
        )  # fmt: skip
        queries = self.op("Mul", queries, self.const(width**-0.5))
        queries = self.shape(queries, 0, config.n_kv_heads, groups, -1, width)
        keys, values = (self.op("Unsqueeze", part, self.const([2])) for part in (keys, values))
        scores = self.op("MatMul", queries, self.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        weights = self.op("Softmax", self.op("Add", scores, self.context.mask), axis=-1)
        out = self.shape(self.op("MatMul", weights, values), 0, config.n_heads, -1, width)
        out = self.op("Transpose", out, perm=[0, 2, 1, 3])
        return self.linear(self.shape(out, 0, 0, config.n_heads * width), attention.o_proj)

    def heads(self, x: str, layer: nn.Module, bias: Tensor | None, norm: nn.Module | None) -> str:
        """Queries, keys or values, (batch, heads, new, head_dim); norm: where RoPE follows."""
        config = self.config
        x = self.linear(x, layer)
        if bias is not None:
            x = self.op("Add", x, self.weight(bias))
        if isinstance(norm, AllHeadsNorm):
            x = self.norm(x, norm)
        x = self.shape(x, 0, 0, -1, config.head_dim)
        if isinstance(norm, HeadNorm):
            x = self.norm(x, norm)
        if norm is not None:
            first, second = self.ops("Split", 2, x, axis=-1)
            turned = self.op("Mul", self.op("Concat", second, first, axis=-1), self.context.sin)
            x = self.op("Add", self.op("Mul", x, self.context.cos), turned)
        return self.op("Transpose", x, perm=[0, 2, 1, 3])

    def norm(self, x: str, norm: RMSNorm) -> str:
        """In the form that onnxruntime knows as one operation of its own."""
        square = self.op("ReduceMean", self.op("Pow", x, self.const(2.0)), axes=[-1])
        size = self.op("Sqrt", self.op("Add", square, self.const(norm.eps)))
        return self.op("Mul", self.op("Div", x, size), self.weight(norm.weight))

    def linear(self, x: str, layer: Any) -> str:
        return self.op("MatMul", x, self.weight(layer.weight, turned=True))

    def shape(self, x: str, *sizes: int) -> str:
        """sizes: 0 keeps the size at this place, -1 takes what is left."""
        return self.op("Reshape", x, self.const(list(sizes)))

    def weight(
        self, parameter: Tensor, *, turned: bool = False, value: Tensor | None = None
    ) -> str:
        """A parameter, stored at its first use. value: stored in its place."""
        name = self.names[id(parameter)] + (".T" if turned else "")
        if name not in self.stored:
            array = (parameter if value is None else value).detach().float()
            array = array.T.contiguous() if turned else array
            self.stored[name] = numpy_helper.from_array(array.numpy(), name)
        return name

    def const(self, value: Any) -> str:
        """A number or a list of integers; floats are float32, integers int64."""
        name = f"const {value}"
        if name not in self.stored:
            kind = np.float32 if isinstance(value, float) else np.int64
            self.stored[name] = numpy_helper.from_array(np.array(value, kind), name)
        return name

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        return self.ops(kind, 1, *inputs, out=out, **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: str, out: str | None = None, **attributes: Any
    ) -> list[str]:
        number = len(self.nodes)
        outputs = [out] if out else [f"{number}.{n}" if n else f"{number}" for n in range(count)]
        node = helper.make_node(kind, list(inputs), outputs, f"{kind} {number}", **attributes)
        self.nodes.append(node)
        return outputs


def _value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def save_graph(graph: Any, file: Path, *, apart: bool) -> None:
    """Write it. apart: the weights go to a second file, FILE.data."""
    where = f"{file.name}.data" if apart else None
    onnx.save_model(graph, str(file), save_as_external_data=apart, location=where)


def stored_sizes(graph: Any) -> tuple[float, int]:
    """The bits of a weight in the blocks' linear layers, their scales included, and the bytes of
    all weights. graph: it, or its file."""
    if isinstance(graph, Path):
        graph = onnx.load(str(graph))
    bits, weights, size = 0, 0, 0
    for stored in graph.graph.initializer:
        each = helper.tensor_dtype_to_np_dtype(stored.data_type).itemsize
        count = math.prod(stored.dims)
        size += each * count
        if "_proj.weight" in stored.name:
            bits += 8 * each * count
            weights += count if len(stored.dims) == 2 else 0
    return bits / weights, size
