"""A quantised copy of a model that is in memory."""

from __future__ import annotations

from torch import Tensor

from mixtral.errors import UsageError
from mixtral.kernels.packing import pack
from mixtral.model import Mixtral
from mixtral.quant.formats import PLAIN
from mixtral.quant.load import empty_quantised
from mixtral.quant.pack import UnpackedState, packed_modules
from mixtral.quant.quantize import pack_parameter
from mixtral.quant.scheme import PACKED, QuantScheme, stored_shapes
from mixtral.weights.names import fixed_dtype


def quantised_copy(model: Mixtral, scheme: QuantScheme) -> Mixtral:
    """The model in another scheme, made one parameter after the other; what is not quantised is kept.

    Raises UsageError for a model that is not packed in a plain format, as `mixtral.load` packs it on a CPU.
    """
    if not any(True for _ in packed_modules(model)):
        raise UsageError("quantised copy: the model's weights are not packed; load it with the native runner")
    source, config = UnpackedState(model), model.config
    state: dict[str, Tensor] = {}
    for stored, shape in stored_shapes(config, scheme).items():
        name = stored.removesuffix(PACKED)
        fmt = scheme.format(name)
        state[stored] = source.read(name) if fmt is None else pack_parameter(source, name, fmt, shape)
    plain = PLAIN[state["embedding.weight"].dtype]
    if config.tie_embeddings:
        state["embedding.weight" + PACKED] = pack(state.pop("embedding.weight"), plain.name)
    activations = model.embedding.dtype
    for name, tensor in state.items():
        if not name.endswith(PACKED) and name != "embedding.weight":
            state[name] = tensor.to(fixed_dtype(name, config) or activations)
    copy = empty_quantised(config, scheme, plain, activations)
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)
