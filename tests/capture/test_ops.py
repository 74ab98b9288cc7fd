"""The closed table against the installed torch: schemas, purity, and who may share memory with whom."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from motte.capture.ops import FORCED, KINDS, OPS, OpSpec, split_top_level
from motte.capture.tensors import overload
from motte.engines.reuse import INPLACE

DTYPES = (torch.float32, torch.int64, torch.bool)


def f(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.8 + 0.1


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


LSTM = [f(20, 3), f(20, 5), f(20), f(20)]
SAMPLES: dict[str, tuple[Any, ...]] = {
    "aten.conv1d.default": (f(1, 2, 9), f(4, 2, 3)),
    "aten.conv2d.default": (f(1, 2, 9, 9), f(4, 2, 3, 3)),
    "aten.conv3d.default": (f(1, 2, 5, 5, 5), f(4, 2, 3, 3, 3)),
    "aten.conv1d.padding": (f(1, 2, 9), f(4, 2, 3), None, [1], "same"),
    "aten.conv2d.padding": (f(1, 2, 9, 9), f(4, 2, 3, 3), None, [1, 1], "same"),
    "aten.conv3d.padding": (f(1, 2, 5, 5, 5), f(4, 2, 3, 3, 3), None, [1, 1, 1], "valid"),
    "aten.conv_transpose1d.default": (f(1, 2, 9), f(2, 4, 3)),
    "aten.conv_transpose2d.input": (f(1, 2, 9, 9), f(2, 4, 3, 3)),
    "aten.conv_transpose3d.input": (f(1, 2, 5, 5, 5), f(2, 4, 3, 3, 3)),
    "aten.convolution.default": (f(1, 2, 9, 9), f(4, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "aten.linear.default": (f(3, 4), f(5, 4), f(5)),
    "aten.bilinear.default": (f(3, 4), f(3, 5), f(2, 4, 5), None),
    "aten.addmm.default": (f(5), f(3, 4), f(4, 5)),
    "aten.baddbmm.default": (f(2, 3, 5), f(2, 3, 4), f(2, 4, 5)),
    "aten.addbmm.default": (f(3, 5), f(2, 3, 4), f(2, 4, 5)),
    "aten.mv.default": (f(3, 4), f(4)),
    "aten.addmv.default": (f(3), f(3, 4), f(4)),
    "aten.tensordot.default": (f(3, 4), f(4, 5), [1], [0]),
    "aten.einsum.default": ("ij,jk->ik", [f(3, 4), f(4, 5)]),
    "aten.linalg_cross.default": (f(2, 3), f(2, 3)),
    "aten.cdist.default": (f(3, 4), f(5, 4)),
    "aten.scaled_dot_product_attention.default": (f(1, 2, 3, 4), f(1, 2, 3, 4), f(1, 2, 3, 4)),
    "aten._native_batch_norm_legit_no_training.default": (f(2, 3, 4), f(3), f(3), f(3), f(3), 0.1, 1e-5),
    "aten._native_batch_norm_legit.no_stats": (f(2, 3, 4), f(3), f(3), True, 0.1, 1e-5),
    "aten.layer_norm.default": (f(2, 3, 4), [4], f(4), f(4)),
    "aten.native_layer_norm.default": (f(2, 3, 4), [4], f(4), f(4), 1e-5),
    "aten.group_norm.default": (f(2, 4, 3), 2, f(4), f(4)),
    "aten.native_group_norm.default": (f(2, 4, 3), f(4), f(4), 2, 4, 3, 2, 1e-5),
    "aten.instance_norm.default": (f(2, 4, 3), f(4), f(4), None, None, True, 0.1, 1e-5, False),
    "aten.rms_norm.default": (f(2, 4), [4], f(4)),
    "aten.lstm.input": (f(2, 6, 3), [f(1, 2, 5), f(1, 2, 5)], LSTM, True, 1, 0.0, False, False, True),
    "aten.gru.input": (f(6, 2, 3), f(1, 2, 5), [f(15, 3), f(15, 5)], False, 1, 0.0, False, False, False),
    "aten.rnn_tanh.input": (f(6, 2, 3), f(1, 2, 5), [f(5, 3), f(5, 5)], False, 1, 0.0, False, False, False),
    "aten.rnn_relu.input": (f(6, 2, 3), f(1, 2, 5), [f(5, 3), f(5, 5)], False, 1, 0.0, False, False, False),
    "aten.lstm_cell.default": (f(2, 3), [f(2, 5), f(2, 5)], f(20, 3), f(20, 5)),
    "aten.gru_cell.default": (f(2, 3), f(2, 5), f(15, 3), f(15, 5)),
    "aten.rnn_tanh_cell.default": (f(2, 3), f(2, 5), f(5, 3), f(5, 5)),
    "aten.rnn_relu_cell.default": (f(2, 3), f(2, 5), f(5, 3), f(5, 5)),
    "aten.pad.default": (f(2, 3), [1, 1]),
    "aten.constant_pad_nd.default": (f(2, 3), [0, 0]),
    "aten.reflection_pad1d.default": (f(2, 3), [1, 1]),
    "aten.reflection_pad2d.default": (f(2, 3, 3), [1, 1, 1, 1]),
    "aten.reflection_pad3d.default": (f(2, 3, 3, 3), [1, 1, 1, 1, 1, 1]),
    "aten.replication_pad1d.default": (f(2, 3), [1, 1]),
    "aten.replication_pad2d.default": (f(2, 3, 3), [1, 1, 1, 1]),
    "aten.replication_pad3d.default": (f(2, 3, 3, 3), [1, 1, 1, 1, 1, 1]),
    "aten.grid_sampler.default": (f(1, 2, 4, 4), f(1, 3, 3, 2), 0, 0, False),
    "aten.grid_sampler_2d.default": (f(1, 2, 4, 4), f(1, 3, 3, 2), 0, 0, False),
    "aten.grid_sampler_3d.default": (f(1, 2, 4, 4, 4), f(1, 3, 3, 3, 3), 0, 0, False),
    "aten.affine_grid_generator.default": (f(1, 2, 3), [1, 2, 4, 4], False),
    "aten.channel_shuffle.default": (f(1, 4, 2, 2), 2),
    "aten.im2col.default": (f(1, 2, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.col2im.default": (f(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.gather.default": (f(2, 3), 1, ints(2, 2)),
    "aten.take_along_dim.default": (f(2, 3), ints(2, 1), 1),
    "aten.take.default": (f(2, 3), ints(4)),
    "aten.index.Tensor": (f(2, 3), [None, ints(2)]),
    "aten.index_select.default": (f(2, 3), 1, ints(2)),
    "aten.embedding.default": (f(4, 3), ints(2)),
    "aten.one_hot.default": (ints(2), 3),
    "aten.masked_fill.Scalar": (f(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5),
    "aten.masked_fill.Tensor": (f(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor(0.5)),
    "aten.where.self": (torch.ones(2, 3, dtype=torch.bool), f(2, 3), f(2, 3)),
    "aten.where.ScalarOther": (torch.ones(2, 3, dtype=torch.bool), f(2, 3), 0.5),
    "aten.where.ScalarSelf": (torch.ones(2, 3, dtype=torch.bool), 0.5, f(2, 3)),
    "aten.where.Scalar": (torch.ones(2, 3, dtype=torch.bool), 0.5, 1.5),
    "aten.slice_scatter.default": (f(2, 3), f(1, 3), 0, 0, 1),
    "aten.select_scatter.default": (f(2, 3), f(3), 0, 0),
    "aten.diagonal_scatter.default": (f(3, 3), f(3)),
    "aten.scatter.src": (f(2, 3), 1, ints(2, 1), f(2, 1)),
    "aten.scatter.value": (f(2, 3), 1, ints(2, 1), 1.5),
    "aten.scatter_add.default": (f(2, 3), 1, ints(2, 1), f(2, 1)),
    "aten.scatter_reduce.two": (f(2, 3), 1, ints(2, 1), f(2, 1), "sum"),
    "aten.index_put.default": (f(2, 3), [ints(1)], f(3)),
    "aten.index_add.default": (f(2, 3), 0, ints(1), f(1, 3)),
    "aten.index_copy.default": (f(2, 3), 0, ints(1), f(1, 3)),
    "aten.index_fill.int_Scalar": (f(2, 3), 0, ints(1), 1.5),
    "aten.index_fill.int_Tensor": (f(2, 3), 0, ints(1), torch.tensor(1.5)),
    "aten.bucketize.Tensor": (f(2, 3), torch.arange(3.0)),
    "aten.searchsorted.Tensor": (torch.arange(3.0), f(2, 3)),
    "aten.linspace.default": (0.0, 1.0, 5),
    "aten.scalar_tensor.default": (1.5,),
    "aten.zero.default": (f(2, 3),),
    "aten.fill.Tensor": (f(2, 3), torch.tensor(1.5)),
    "aten.tril_indices.default": (3, 3),
    "aten.triu_indices.default": (3, 3),
    "aten.arange.start_step": (0, 6, 2),
    "aten.cat.default": ([f(2, 3)],),
    "aten.repeat.default": (f(2, 3), [1, 1]),
    "aten.tile.default": (f(2, 3), [1, 1]),
    "aten.roll.default": (f(2, 3), [0], [0]),
    "aten.rot90.default": (f(2, 3), 0),
    "aten.flip.default": (f(2, 3), []),
    "aten.view.default": (f(2, 3), [3, 2]),
    "aten._unsafe_view.default": (f(2, 3), [3, 2]),
    "aten.reshape.default": (f(2, 3), [3, 2]),
    "aten.permute.default": (f(2, 3), [1, 0]),
    "aten.expand.default": (f(1, 3), [2, 3]),
    "aten.broadcast_to.default": (f(1, 3), [2, 3]),
    "aten.unflatten.int": (f(2, 4), 1, [2, 2]),
    "aten.split_with_sizes.default": (f(2, 3), [1, 2], 1),
    "aten.split.sizes": (f(2, 3), [1, 2], 1),
    "aten.movedim.intlist": (f(2, 3), [0], [1]),
    "aten.meshgrid.default": ([f(2), f(3)],),
    "aten.meshgrid.indexing": ([f(2), f(3)],),
    "aten.to.dtype": (f(2, 3), torch.float32),
    "aten.squeeze.dims": (f(2, 1, 3), [1]),
    "aten.chunk.default": (f(2, 3), 2, 1),
    "aten.unfold.default": (f(4, 4), 0, 2, 1),
    "aten.pixel_shuffle.default": (f(1, 4, 2, 2), 1),
    "aten.pixel_unshuffle.default": (f(1, 4, 2, 2), 1),
    "aten.acosh.default": (f(2, 3) + 1,),
    "aten.clamp.default": (f(2, 3), 0.0, 1.0),
    "aten.clamp.Tensor": (f(2, 3), f(2, 3) * 0, f(2, 3) + 1),
    "aten.clip.default": (f(2, 3), 0.0, 1.0),
    "aten.count_nonzero.dim_IntList": (f(2, 3), [0]),
    "aten.glu.default": (f(2, 4),),
    "aten.prelu.default": (f(2, 3), f(3)),
    "aten._prelu_kernel.default": (f(2, 3), f(2, 3)),
    "aten.trapezoid.dx": (f(2, 3),),
    "aten.upsample_nearest1d.vec": (f(1, 2, 4), [8], None),
    "aten.upsample_nearest2d.vec": (f(1, 2, 4, 4), [4, 4], None),
    "aten.upsample_nearest3d.vec": (f(1, 2, 4, 4, 4), [8, 8, 8], None),
    "aten._upsample_nearest_exact1d.vec": (f(1, 2, 4), [4], None),
    "aten._upsample_nearest_exact2d.vec": (f(1, 2, 4, 4), [8, 8], None),
    "aten._upsample_nearest_exact3d.vec": (f(1, 2, 4, 4, 4), [8, 8, 8], None),
    "aten.upsample_linear1d.vec": (f(1, 2, 4), [4], False, None),
    "aten.upsample_bilinear2d.vec": (f(1, 2, 4, 4), [4, 4], False, None),
    "aten.upsample_trilinear3d.vec": (f(1, 2, 4, 4, 4), [4, 4, 4], False, None),
    "aten.upsample_bicubic2d.vec": (f(1, 2, 4, 4), [4, 4], False, None),
    "aten._upsample_bilinear2d_aa.vec": (f(1, 2, 4, 4), [4, 4], False, None),
    "aten._upsample_bicubic2d_aa.vec": (f(1, 2, 4, 4), [4, 4], False, None),
    "aten.upsample_nearest1d.default": (f(1, 2, 4), [4]),
    "aten.upsample_nearest2d.default": (f(1, 2, 4, 4), [4, 4]),
    "aten.upsample_nearest3d.default": (f(1, 2, 4, 4, 4), [4, 4, 4]),
    "aten.upsample_linear1d.default": (f(1, 2, 4), [4], False),
    "aten.upsample_bilinear2d.default": (f(1, 2, 4, 4), [4, 4], False),
    "aten.upsample_trilinear3d.default": (f(1, 2, 4, 4, 4), [4, 4, 4], False),
    "aten.upsample_bicubic2d.default": (f(1, 2, 4, 4), [4, 4], False),
}
"""Arguments where :func:`guesses` finds none; those that could give back their input (a pad of 0) on purpose."""


def guesses(spec: OpSpec) -> Any:
    """Argument lists that may suit ``spec``: every required parameter by its kind, over ranks and element types."""
    for rank, dtype in itertools.product((2, 1, 3, 4, 5, 0), DTYPES):
        tensor = f(*([4] * rank)).to(dtype)
        made: dict[str, Any] = {
            "Tensor": tensor, "Scalar": 1, "SymInt": 2, "int": 0, "float": 0.5, "bool": False, "str": "none",
            "ScalarType": torch.float32, "MemoryFormat": torch.contiguous_format,
        }  # fmt: skip
        args, kwargs = [], {}
        for parameter in spec.parameters:
            if parameter.has_default:
                continue
            value = None if parameter.optional else made[parameter.kind]
            if parameter.is_list and not parameter.optional:
                count = parameter.list_size or 2
                value = [tensor] * 2 if parameter.kind == "Tensor" else [0] * count
                if parameter.name in ("kernel_size", "output_size", "size", "sections"):
                    value = [2] * count
            if parameter.keyword_only:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        yield args, kwargs


def sample(spec: OpSpec) -> tuple[list[Any], dict[str, Any], tuple[Any, ...]]:
    """Arguments that torch takes for ``spec``, and its results."""
    call = overload(spec.name)
    if spec.name in SAMPLES:
        args = list(SAMPLES[spec.name])
        kwargs = {"indexing": "ij"} if spec.name == "aten.meshgrid.indexing" else {}
        return args, kwargs, results(call(*args, **kwargs))
    for args, kwargs in guesses(spec):
        try:
            return args, kwargs, results(call(*args, **kwargs))
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
            continue
    raise AssertionError(f"no sample arguments for {spec.schema}")


def results(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def tensors_of(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for item in values for tensor in tensors_of(item)] if isinstance(values, list | tuple) else []


def memory(values: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(values) if tensor.numel()}


@pytest.mark.parametrize("name", OPS)
def test_schema_is_the_installed_torch_s(name: str) -> None:
    assert str(overload(name)._schema) == OPS[name].schema


@pytest.mark.parametrize("name", OPS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_operation_is_pure_and_says_who_shares_memory(name: str) -> None:
    """Twice the same result, arguments unchanged, and new memory where the table says so."""
    spec = OPS[name]
    with torch.inference_mode():
        args, kwargs, first = sample(spec)
        before = [tensor.clone() for tensor in tensors_of(args)]
        second = results(overload(name)(*args, **kwargs))
    assert len(first) == spec.results or spec.returns_list
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(args), strict=True))
    if not spec.view:
        assert not memory(first) & memory([args, list(kwargs.values())])


IDENTITIES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("aten.pad.default", (f(2, 3), [0, 0])),
    ("aten.pad.default", (f(1, 2, 3), [0, 0], "reflect")),
    ("aten.hstack.default", ([f(2, 3)],)),
    ("aten.vstack.default", ([f(2, 3)],)),
    ("aten.dstack.default", ([f(2, 3, 4)],)),
    ("aten.floor.default", (ints(2, 3),)),
    ("aten.round.default", (ints(2, 3),)),
    ("aten.nan_to_num.default", (ints(2, 3),)),
    ("aten.channel_shuffle.default", (f(1, 4, 2, 2), 1)),
    ("aten.channel_shuffle.default", (f(1, 1, 2, 2), 1)),
    ("aten.max_pool1d.default", (f(1, 2, 4), [1])),
    ("aten.max_pool2d.default", (f(1, 2, 4, 4), [1, 1])),
    ("aten.avg_pool1d.default", (f(1, 2, 4), [1])),
    ("aten.adaptive_avg_pool1d.default", (f(1, 2, 4), [4])),
    ("aten.adaptive_avg_pool2d.default", (f(1, 2, 4, 4), [4, 4])),
    ("aten.repeat_interleave.self_int", (f(2, 3), 1)),
    ("aten._to_copy.default", (f(2, 3),)),
    ("aten.softmax.int", (f(2, 1), 1)),
    ("aten.sum.dim_IntList", (f(2, 3), [])),
    ("aten.mean.dim", (f(2, 3, 1), [2], True)),
    ("aten.amax.default", (f(2, 3, 1), [2], True)),
    ("aten.max.dim", (f(2, 3, 1), 2, True)),
    ("aten.prod.dim_int", (f(2, 3, 1), 2)),
    ("aten.sort.default", (f(2, 1),)),
    ("aten.topk.default", (f(2, 3), 3)),
    ("aten.cumsum.default", (f(2, 1), 1)),
    ("aten.diff.default", (f(2, 3), 0)),
    ("aten.index.Tensor", (f(2, 3), [torch.arange(2)])),
    ("aten.slice_scatter.default", (f(2, 3), f(2, 3))),
    ("aten.gather.default", (f(2, 1), 1, ints(2, 1))),
    ("aten.tensordot.default", (f(3, 4), f(4, 5), [], [])),
    ("aten.matmul.default", (f(3, 1), f(1, 1))),
    ("aten.triu.default", (f(1, 1),)),
    ("aten.rot90.default", (f(2, 3), 4)),
    ("aten.logcumsumexp.default", (f(1, 1), 0)),
    ("aten.logsumexp.default", (f(2, 1), [1], True)),
    ("aten.pow.Tensor_Scalar", (f(2, 3), 1)),
    ("aten.norm.Scalar", (f(1),)),
    ("aten.lerp.Scalar", (f(2, 3), f(2, 3), 0.0)),
    ("aten.threshold.default", (f(2, 3), 0.0, 0.0)),
    ("aten.clamp_min.default", (f(2, 3), 0.0)),
)
"""Calls that could give back their own argument, of operations of which the table says that they never do."""


@pytest.mark.parametrize(("name", "args"), IDENTITIES, ids=[name for name, _ in IDENTITIES])
def test_fresh_results_are_fresh_even_where_nothing_changes(name: str, args: tuple[Any, ...]) -> None:
    assert not OPS[name].view
    with torch.inference_mode():
        found = results(overload(name)(*args))
    assert not memory(found) & memory(args)


def test_parameters_agree_with_torch_s_own_parser() -> None:
    for spec in OPS.values():
        schema = overload(spec.name)._schema
        assert [p.name for p in spec.parameters] == [a.name for a in schema.arguments], spec.schema
        assert [p.keyword_only for p in spec.parameters] == [a.kwarg_only for a in schema.arguments], spec.schema
        assert [p.has_default for p in spec.parameters] == [a.has_default_value() for a in schema.arguments], (
            spec.schema
        )
        optional = [a.type.kind() == "OptionalType" for a in schema.arguments]
        assert [p.optional for p in spec.parameters] == optional, spec.schema
        assert all(p.kind in KINDS for p in spec.parameters), spec.schema
        assert spec.results == len(schema.returns), spec.schema


def test_table_holds_nothing_random_or_in_place() -> None:
    for spec in OPS.values():
        found = overload(spec.name)
        assert not found._schema.is_mutable, spec.schema
        assert torch.Tag.nondeterministic_seeded not in found.tags or any(
            parameter.name in FORCED for parameter in spec.parameters
        ), spec.schema


@pytest.mark.parametrize("name", INPLACE)
def test_in_place_form_gives_the_same_bits(name: str) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * 4
    two = name.endswith(".Tensor")
    rest = [torch.randn(7, 33, generator=torch.Generator().manual_seed(2))] if two else []
    expected = overload(name)(x, *rest)
    base, kind = INPLACE[name], name.rpartition(".")[2]
    found = getattr(getattr(torch.ops.aten, base), kind)(x, *rest)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(expected, found)


def test_split_top_level_respects_brackets() -> None:
    assert list(split_top_level("a, b[1, 2], (c, d), e")) == ["a", "b[1, 2]", "(c, d)", "e"]
    assert list(split_top_level("")) == []
