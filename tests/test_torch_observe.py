"""accumulate_hessians: which layers and experts of a model it sees, and all-MiniLM-L6-v2."""

import subprocess
import sys
from typing import Any

import minilm
import pytest

torch = pytest.importorskip("torch")
from torch_helpers import close, gaussian  # noqa: E402

import nvfp4sweep_torch as nt  # noqa: E402

F = torch.nn.functional

# --- linear layers --------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Linear layers, one of them of an odd width, one shared and one that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, 40)
        self.odd = torch.nn.Linear(40, 32)
        self.last = self.again = torch.nn.Linear(32, 32)
        self.unused = torch.nn.Linear(16, 16)

    def forward(self, x: Any) -> Any:
        return self.again(input=self.last(self.odd(self.first(x))))


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_linear_layers_of_a_model() -> None:
    model, x = Layers(), gaussian(2, 5, 32)
    with nt.accumulate_hessians(model) as found:
        assert set(found) == {"first.weight", "last.weight", "again.weight", "unused.weight"}
        assert set(found) <= set(model.state_dict())
        model(x)
        model(2 * x)
    assert hooks(model) == 0
    model(x)
    close(found["first.weight"].hessian(), torch.cat([x, 2 * x]))
    assert found["again.weight"] is found["last.weight"]
    assert found["last.weight"].tokens == 40
    assert found["unused.weight"].tokens == 0
    assert found["first.weight"].importance().shape == (32,)


def test_where_and_device() -> None:
    model = Layers()
    seen = {}
    with nt.accumulate_hessians(model, where=lambda name, weight: seen.update({name: weight})) as found:
        assert hooks(model) == 0
    assert found == {}
    assert seen["first.weight"] is model.first.weight
    with nt.accumulate_hessians(model, where=lambda name, weight: name == "again.weight") as found:
        model(gaussian(5, 32))
    assert list(found) == ["again.weight"]
    with nt.accumulate_hessians(model, device="meta") as found:
        assert found["first.weight"].total.is_meta
    with nt.accumulate_hessians(model.to("meta")) as found:
        assert found["first.weight"].total.is_cpu
    with nt.accumulate_hessians(torch.nn.Linear(16, 1)) as found:
        assert list(found) == ["weight"]


def test_hooks_and_modes_go_on_exceptions() -> None:
    model = torch.nn.Sequential(Layers(), Experts())
    with pytest.raises(RuntimeError, match="mat1 and mat2"), nt.accumulate_hessians(model) as found:
        model(gaussian(5, 31))  # the model's own error, and nothing is added
    assert hooks(model) == 0
    assert not torch.overrides._get_current_function_mode_stack()
    assert found["0.first.weight"].tokens == 0

    def where(name: str, weight: Any) -> bool:
        if name == "0.last.weight":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError), nt.accumulate_hessians(model, where=where):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("way", [torch.compile, torch.nn.Module.compile])
def test_compiled_models_run_eagerly(way: Any) -> None:
    model = Layers()
    compiled = way(model, backend="eager")
    compiled = model if compiled is None else compiled
    compiled(gaussian(5, 32))
    with nt.accumulate_hessians(compiled) as found:
        compiled(gaussian(5, 32))
    assert [a.tokens for name, a in found.items() if name.endswith("first.weight")] == [5]
    assert set(found) <= set(compiled.state_dict())


def test_torch_dynamo_is_not_loaded() -> None:
    program = """
import sys, torch, nvfp4sweep_torch
with nvfp4sweep_torch.accumulate_hessians(torch.nn.Linear(16, 16)):
    assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- experts in one parameter ---------------------------------------------------------------------


class Experts(torch.nn.Module):
    """Three experts [out, in] and their transposes, and the two halves of each as gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(gaussian(3, 16, 32))
        self.kernel = torch.nn.Parameter(gaussian(3, 32, 16))
        self.conv = torch.nn.Parameter(gaussian(16, 16, 3))
        self.alone = torch.nn.Linear(32, 32)

    def forward(self, x: Any) -> Any:
        return self.alone(x)


PRODUCTS = {
    "linear": lambda x, e, m: F.linear(x, m.up[e]),
    "linear by name": lambda x, e, m: F.linear(weight=m.up[e], input=x),
    "linear transposed": lambda x, e, m: F.linear(x, m.kernel[e].t()),
    "index tensor": lambda x, e, m: F.linear(x, m.up[torch.tensor(e)]),
    "unbind": lambda x, e, m: F.linear(x, m.up.unbind()[e]),
    "@": lambda x, e, m: x @ m.kernel[e],
    "@ transposed": lambda x, e, m: x @ m.up[e].T,
    "matmul": lambda x, e, m: torch.matmul(x, other=m.kernel[e]),
    "Tensor.matmul": lambda x, e, m: x.matmul(m.kernel[e]),
    "mm": lambda x, e, m: torch.mm(x, m.kernel[e]),
    "Tensor.mm": lambda x, e, m: x.mm(m.kernel[e]),
    "halves": lambda x, e, m: (F.linear(x, m.up[e][:8]), F.linear(x, m.up[e, 8:])),
    "half of a kernel": lambda x, e, m: x @ m.kernel[e][:, 4:12],
    "one token": lambda x, e, m: [F.linear(token, m.up[e]) for token in x],
    "detached": lambda x, e, m: F.linear(x, m.up.detach()[e]),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_with_one_expert(product: str, mode: Any) -> None:
    model, x = Experts(), gaussian(7, 32)
    with mode(), nt.accumulate_hessians(model) as found:
        PRODUCTS[product](x, 1, model)
        model(x)
    (name,) = set(found) - {"alone.weight"}
    hessian, shape = found[name].hessian(), getattr(model, name).shape
    close(hessian[1], x)
    assert not hessian[[0, 2]].any()
    assert torch.broadcast_shapes(found[name].importance().shape, shape) == shape
    assert found["alone.weight"].tokens == 7


ALL_PRODUCTS = {
    "bmm": lambda x, m: torch.bmm(x, m.kernel),
    "Tensor.bmm": lambda x, m: x.bmm(m.up.transpose(1, 2)),
    "@": lambda x, m: x @ m.up.mT,
    "matmul": lambda x, m: torch.matmul(x[None], m.kernel),
}


@pytest.mark.parametrize("product", ALL_PRODUCTS)
def test_products_with_all_experts(product: str) -> None:
    model, x = Experts(), gaussian(3, 7, 32)
    with nt.accumulate_hessians(model) as found:
        ALL_PRODUCTS[product](x, model)
    (name,) = set(found) - {"alone.weight"}
    for expert in range(3):
        close(found[name].hessian()[expert], x[expert])


def test_all_experts_see_what_is_broadcast() -> None:
    model, x = Experts(), gaussian(7, 32)
    with nt.accumulate_hessians(model) as found:
        torch.matmul(x, model.kernel)
        torch.matmul(x[0], model.kernel)
    for hessian in found["kernel"].hessian():
        close(hessian, torch.cat([x, x[:1]]))


def test_grouped_products() -> None:
    model, x = Experts().to(torch.bfloat16), gaussian(7, 32).bfloat16()
    ends = torch.tensor([3, 3, 6], dtype=torch.int32)
    with nt.accumulate_hessians(model) as found:
        F.grouped_mm(x, model.up.transpose(-2, -1), offs=ends)
    assert found["up"].tokens.tolist() == [3, 0, 3]
    close(found["up"].hessian()[0], x[:3].float())
    close(found["up"].hessian()[2], x[3:6].float())


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("axis", [1, 2])
def test_parameters_side_by_side_in_memory(side: int, axis: int) -> None:
    model, x = torch.nn.Module(), gaussian(7, 16)
    for name, part in zip(
        "ab", gaussian(3, *((16, 32) if side == 2 else (32, 16))).chunk(2, side), strict=True
    ):
        model.register_parameter(name, torch.nn.Parameter(part))
    assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    with nt.accumulate_hessians(model) as found:
        for factor, weight in ((1, model.a), (2, model.b)):
            F.linear(factor * x, weight[1] if axis == 2 else weight[1].t())
    close(found["a"].hessian()[1], x)
    close(found["b"].hessian()[1], 2 * x)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu"])
def test_cuda_model(device: Any) -> None:
    model, x = Experts().to("cuda", torch.bfloat16), gaussian(7, 32).bfloat16()
    ends = torch.tensor([3, 3, 7], dtype=torch.int32, device="cuda")
    with torch.no_grad(), nt.accumulate_hessians(model, device=device) as found:
        F.grouped_mm(model(x.cuda()) * 0 + x.cuda(), model.up.mT, offs=ends)
        x.cuda() @ model.kernel[torch.tensor(1, device="cuda")]
    assert {a.total.device.type for a in found.values()} == {device or "cuda"}
    assert found["up"].tokens.tolist() == [3, 0, 4]
    close(found["up"].hessian()[2].cpu(), x[3:].float())
    close(found["kernel"].hessian()[1].cpu(), x.float())
    close(found["alone.weight"].hessian().cpu(), x.float())


NOT_PRODUCTS = {
    "all experts of each token": lambda x, m: F.linear(x, m.up.view(48, 32)),
    "some of the inputs": lambda x, m: F.linear(x[:, :16], m.up[1][:, :16]),
    "some of a kernel's inputs": lambda x, m: x[:, 16:] @ m.kernel[1, 16:],
    "several experts": lambda x, m: torch.matmul(x, m.kernel[1:]),
    "a copy": lambda x, m: F.linear(x, m.up[1].clone()),
    "left side": lambda x, m: m.up[1] @ x.T,
    "no multiple of 16": lambda x, m: F.linear(x[:, :3], m.conv[1]),
    "a vector": lambda x, m: x @ m.kernel[1, :, 0],
}


@pytest.mark.parametrize("product", NOT_PRODUCTS)
def test_nothing_else_is_taken_for_an_expert(product: str) -> None:
    model, x = Experts(), gaussian(7, 32)
    with nt.accumulate_hessians(model) as found:
        NOT_PRODUCTS[product](x, model)
    assert list(found) == ["alone.weight"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_of_the_transformers_library(implementation: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **experts)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad(), nt.accumulate_hessians(model) as found:
        model(tokens)
    assert set(found) <= set(model.state_dict())
    assert found["layers.1.self_attn.q_proj.weight"].tokens == 24
    stacked = {name for name in found if ".experts." in name}
    if implementation == "batched_mm":  # gathers copies: the documents say that it is not seen
        assert not stacked
        return
    assert stacked == {f"layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")}
    for name in stacked:
        weight = model.get_parameter(name)
        assert found[name].tokens.sum() == 48  # each token goes to two experts
        shape = found[name].importance().shape
        assert torch.broadcast_shapes(shape, weight.shape) == weight.shape
        assert shape[2 if kind == "Mixtral" else 1] == (48 if "down" in name else 32)
    model.set_experts_implementation("eager")
    with torch.no_grad(), nt.accumulate_hessians(model) as again:
        model(tokens)
    for name in found:
        torch.testing.assert_close(again[name].hessian(), found[name].hessian())


# --- a real model ---------------------------------------------------------------------------------

needs_minilm = pytest.mark.skipif(bool(minilm.missing()), reason=str(minilm.missing()))


@needs_minilm
def test_every_linear_layer_of_minilm() -> None:
    found = minilm.hessians()
    parts = ("attention.self.query", "attention.self.key", "attention.self.value")
    parts += ("attention.output.dense", "intermediate.dense", "output.dense")
    expected = [f"encoder.layer.{layer}.{part}.weight" for layer in range(6) for part in parts]
    assert list(found) == [*expected, "pooler.dense.weight"]
    tokens = sum(batch["input_ids"].numel() for batch in minilm.batches())
    assert 400 < tokens < 1000
    for name, accumulator in found.items():
        weight = minilm.model().get_parameter(name)
        # The pooler reads the first token of each sentence.
        assert accumulator.tokens == (len(minilm.SENTENCES) if "pooler" in name else tokens)
        hessian = accumulator.hessian()
        assert hessian.shape == (weight.shape[1] // 16, 16, 16)
        # Two inputs of the pooler are zero for every sentence.
        assert (accumulator.importance() == 0).sum() == (2 if "pooler" in name else 0)
        eigenvalues = torch.linalg.eigvalsh(hessian.double())
        assert eigenvalues.min() > -1e-6 * eigenvalues.max()
    # q, k and v read the same; and inputs differ in importance, or weighting by it would be pointless.
    query, key = (found[f"encoder.layer.3.attention.self.{n}.weight"] for n in ("query", "key"))
    assert torch.equal(query.total, key.total)
    importance = query.importance()
    assert importance.max() > 4 * importance.median()


@needs_minilm
def test_minilm_against_a_direct_computation() -> None:
    name, inputs = "encoder.layer.2.output.dense", []
    layer = minilm.model().get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in minilm.batches():
            minilm.model()(**batch)
    handle.remove()
    close(minilm.hessians()[f"{name}.weight"].hessian(), torch.cat(inputs))
