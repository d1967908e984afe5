"""Exits of an export in transformers, against jexit: tokens, depths, logits, layers not run."""

import copy
import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import jexit
from convert import to_hf
from jexit.config import TINY_CALIBRATED_PATH, Config
from jexit.presets import FAMILIES
from jexit.tasks import make_task
from tolerances import LOGITS, LOGITS_REAL

torch = pytest.importorskip("torch")
hf_models = pytest.importorskip("hf_models")
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: E402

ROOT = Path(__file__).parents[2]
EXITS, LAYERS = (1, 3), 4
TOKENS_BT = hf_models.random_tokens(2, 14, seed=8)


def loaded(source, target, **options):
    assert to_hf.main([f"--source={source}", f"--target={target}"]) == 0
    options = {"trust_remote_code": True, "dtype": "auto"} | options
    return AutoModelForCausalLM.from_pretrained(target, **options).eval()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model in transformers and in jexit, with its tokenizer."""
    target = tmp_path_factory.mktemp("shipped") / "out"
    return loaded(TINY_CALIBRATED_PATH, target), *jexit.load(TINY_CALIBRATED_PATH)


def padded(tokenizer, prompts):
    """Prompts with their padding on the left, as `generate` wants a batch."""
    ids = tokenizer.encode_prompts(prompts)
    longest = max(map(len, ids))
    pad = [[tokenizer.pad_id] * (longest - len(row)) for row in ids]
    mask = [[0] * len(p) + [1] * len(row) for p, row in zip(pad, ids, strict=True)]
    rows = [p + row for p, row in zip(pad, ids, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def completed(model, tokenizer, prompts, new=64):
    """(tokens, depths) of each prompt's greedy completion in transformers, up to its end."""
    inputs = padded(tokenizer, prompts)
    made = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_id,
        eos_token_id=sorted(tokenizer.eos_ids),
    )  # fmt: skip
    tokens = made[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = (model.last_depths > 0).sum(dim=1).tolist()
    depths = model.last_depths.tolist()
    return [
        (row[:length], at[:length]) for row, at, length in zip(tokens, depths, lengths, strict=True)
    ]


def assert_decodes_alike(theirs, ours, tokenizer, prompts, fixed):
    """Greedy tokens and depths are jexit's: alone, and in a padded batch."""
    for name, policy in (
        ("threshold:0.5", jexit.Threshold(0.5)),
        (f"fixed:{fixed}", jexit.Fixed(fixed)),
        ("full", jexit.Full()),
    ):
        theirs.exit_policy = name
        made = jexit.generate(ours, tokenizer, prompts, policy=policy, max_new_tokens=64)
        expected = [(list(t), list(d)) for t, d in zip(made.tokens, made.depths, strict=True)]
        alone = prompts if name == "threshold:0.5" else prompts[:1]
        made = [completed(theirs, tokenizer, [prompt])[0] for prompt in alone]
        assert made == expected[: len(alone)]
        if name == "threshold:0.5":
            assert len({depth for _, depths in expected for depth in depths}) > 1
        assert completed(theirs, tokenizer, prompts[:8]) == expected[:8]
    assert len({depth for _, depths in expected for depth in depths}) == 1  # of `full`


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_greedy_tokens_and_depths_are_jexits_alone_and_in_a_padded_batch(shipped, count):
    draw = np.random.default_rng(3)
    prompts = [
        "sum " + "".join(map(str, draw.integers(0, 10, draw.integers(3, 9)))) for _ in range(count)
    ]
    assert_decodes_alike(*shipped, prompts, fixed=4)


@pytest.mark.weights
def test_a_real_model_decodes_alike(tmp_path):
    """The run that JEXIT_STUDENT names, on word problems, and its logits under given depths."""
    run = os.environ.get("JEXIT_STUDENT", "")
    if not run:
        pytest.skip("JEXIT_STUDENT names no run of calibration or reinforcement")
    theirs, (ours, tokenizer) = loaded(run, tmp_path / "out"), jexit.load(run)
    trained = Config.from_dict(json.loads((Path(run) / "config.json").read_text())).task
    tokenizer.system, tokenizer.thinking = trained.system, trained.thinking
    task = make_task("word_problems")
    prompts = [task.problem("test", index).prompt for index in range(20)]
    assert_decodes_alike(theirs, ours, tokenizer, prompts, fixed=ours.exit_layers[4])
    tokens_BT = np.asarray([tokenizer.encode_prompt(task.problem("test", 0).messages)])
    depth_BT = np.random.default_rng(0).choice(
        [*ours.exit_layers, ours.arch.layers], tokens_BT.shape
    )
    wanted = jexit.forward(ours, tokens_BT, policy=jexit.Prescribed(depth_BT)).logits_BTV
    with torch.no_grad():
        rounded = theirs(torch.tensor(tokens_BT), depths=depth_BT).logits.numpy()
        exact = theirs.double()(torch.tensor(tokens_BT), depths=depth_BT).logits.numpy()
    # Logits of 40 at random depths: PyTorch's own rounding to float32 is 2e-4.
    assert np.abs(wanted - exact).max() <= 3 * np.abs(rounded - exact).max() <= LOGITS_REAL
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    theirs.exit_policy = "full"
    with torch.no_grad():
        assert torch.equal(
            plain(torch.tensor(tokens_BT)).logits, theirs(torch.tensor(tokens_BT)).logits
        )


def test_sampled_exits_have_the_temperature_of_their_training(tmp_path):
    """At a temperature near 0, hazards leave where they exceed a half."""
    copied = shutil.copytree(TINY_CALIBRATED_PATH, tmp_path / "cold")
    exits = json.loads((copied / "exit_heads.json").read_text())
    (copied / "exit_heads.json").write_text(json.dumps(exits | {"hazard_temperature": 1e-6}))
    theirs, (_, tokenizer) = loaded(copied, tmp_path / "out"), jexit.load(copied)
    found = []
    for theirs.exit_policy in ("sample", "threshold:0.5"):
        found.append(completed(theirs, tokenizer, ["sum 37295184", "sum 123"], 30))
    assert found[0] == found[1] and len({*found[0][0][1]}) > 1


def test_sampled_exits_leave_as_often_as_jexits(shipped):
    theirs, ours, tokenizer = shipped
    theirs.exit_policy = "sample"
    torch.manual_seed(0)
    prompts = ["sum 37295184"] * 40
    made = jexit.generate(ours, tokenizer, prompts, policy=jexit.Sample(), max_new_tokens=40)
    both = [
        [depth for depths in rows for depth in depths[1:]]
        for rows in (made.depths, [d for _, d in completed(theirs, tokenizer, prompts, 40)])
    ]
    shares = [np.bincount(depths, minlength=9) / len(depths) for depths in both]
    assert np.abs(shares[0] - shares[1]).max() < 0.06 and shares[0][8] < 0.7


@pytest.mark.parametrize("rank", [0, *(pytest.param(r, marks=pytest.mark.slow) for r in (None, 2))])
def test_prescribed_depths_give_jexits_logits(students, tmp_path, rank):
    """Without a continuation, with full matrices, and with two factors."""
    for family in FAMILIES:
        model, directory = students(family, rank)
        # In float64, so that what differs from it is jexit's rounding alone.
        theirs = loaded(directory, tmp_path / family).double()
        depth_BT = np.random.default_rng(0).choice([*EXITS, LAYERS], TOKENS_BT.shape)
        policy = jexit.Prescribed(depth_BT)
        ours = jexit.forward(model, TOKENS_BT, policy=policy, residuals=True)
        hooked = []  # residuals after each layer
        for layer in theirs.model.layers:
            layer.register_forward_hook(lambda *call, seen=hooked: seen.append(call[-1]))
        with torch.no_grad():
            out = theirs(torch.tensor(TOKENS_BT), depths=depth_BT, output_hidden_states=True)
        assert np.abs(out.logits.numpy() - ours.logits_BTV).max() <= LOGITS
        assert (out.depths.numpy() == depth_BT).all()
        reached_BTE = depth_BT[..., None] >= np.array(EXITS)
        hazard_BTE = out.hazard_logits.numpy()
        assert (np.isnan(hazard_BTE) == ~reached_BTE).all()
        gap = np.abs(hazard_BTE - ours.hazard_logits_BTE)[reached_BTE]
        assert gap.max() <= LOGITS
        # What hooks and `output_hidden_states` see is what was computed.
        for layer in range(1, LAYERS):
            assert torch.equal(hooked[layer - 1], out.hidden_states[layer])
            gap = hooked[layer - 1].numpy() - np.asarray(ours.residual_LBTD[layer])
            assert np.abs(gap).max() <= LOGITS
        # Without trust the same directory is the plain model.
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float64)
        assert isinstance(theirs, type(plain)) and not hasattr(plain, "exit_policy")
        with torch.no_grad():
            found = plain(torch.tensor(TOKENS_BT)).logits - theirs(torch.tensor(TOKENS_BT)).logits
        assert found.abs().max() == 0


def test_a_layer_that_no_row_needs_is_not_run(shipped):
    theirs, _, tokenizer = shipped
    runs = np.zeros(8, int)
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, n=n: runs.__setitem__(n, runs[n] + 1))
        for n, layer in enumerate(theirs.model.layers)
    ]
    theirs.exit_policy = "threshold:0.5"
    ((_, depths),) = completed(theirs, tokenizer, ["sum 37295184"])
    for hook in hooks:
        hook.remove()
    assert runs.tolist() == [sum(depth > layer for depth in depths) for layer in range(8)]
    assert runs[7] < len(depths)


def test_offloaded_layers_have_exits(shipped, tmp_path):
    """A device map puts hooks around the layers before they get their exits."""
    pytest.importorskip("accelerate")
    theirs, _, tokenizer = shipped
    others = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    layers = {f"model.layers.{n}": "disk" if n % 3 else "cpu" for n in range(8)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        theirs.name_or_path, trust_remote_code=True, dtype="auto", offload_folder=tmp_path,
        device_map={"model.embed_tokens": "disk"} | others | layers,
    )  # fmt: skip
    assert offloaded.device.type == "meta"
    on_disk = [layer.mlp.up_proj.weight.is_meta for layer in offloaded.model.layers]
    assert on_disk == [at == "disk" for at in layers.values()]
    inputs = padded(tokenizer, ["sum 37295184"])
    with torch.no_grad():
        wanted, found = (model(**inputs, depths=1) for model in (theirs, offloaded))
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.depths, wanted.depths) and (found.depths == 1).all()
    torch.testing.assert_close(
        found.hazard_logits, wanted.hazard_logits, rtol=0, atol=0, equal_nan=True
    )
    for policy in ("fixed:4", "threshold:0.5"):
        theirs.exit_policy = offloaded.exit_policy = policy
        wanted, found = (
            completed(model, tokenizer, ["sum 37295184"], 24) for model in (theirs, offloaded)
        )
        assert found == wanted
    theirs.exit_policy = "full"


def test_a_layer_without_exits_is_an_error(shipped):
    """Something else, such as a hook, may have replaced its `forward`."""
    theirs, *_ = shipped
    layer, ids = theirs.model.layers[3], torch.tensor([[5, 6]])
    layer.forward = type(layer).__mro__[1].forward.__get__(layer)
    with pytest.raises(RuntimeError, match="7 of 8 layers ran with exits, but all must, and"):
        theirs(ids)
    del layer.forward
    assert (theirs(ids).depths == 8).all()


def test_a_skipped_layer_needs_the_cache_that_is_in_use(shipped, monkeypatch):
    theirs, *_ = shipped
    layer = type(theirs.model.layers[7])
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda self, h, *, cache, **kwargs: forward(self, h, **kwargs)
    )
    with pytest.raises(RuntimeError, match="layer 1 was called with use_cache but without cache"):
        theirs(torch.tensor([[5, 6]]), depths=1)


def test_a_skipped_layer_writes_where_older_caches_are_told():
    """Static caches before transformers 5 write to slot 0 unless they are given the position."""
    module = runpy.run_path(str(ROOT / "convert" / "modeling_jexit.py"))
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        num_hidden_layers=1, vocab_size=10, head_dim=8,
    )  # fmt: skip
    layer = type("WithExits", (LlamaDecoderLayer,), {})(config, 0)

    class Static:
        def __init__(self):
            self.written = []

        def update(self, keys, values, layer, settings=None):
            position = (settings or {}).get("cache_position", torch.arange(keys.shape[-2]))
            self.written += position.tolist()

    angles = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    for given, slot in (({"cache_position": torch.tensor([7])}, 7), ({}, 0)):
        cache = Static()
        told = {"past_key_values": cache, "position_embeddings": angles, **given}
        with torch.no_grad():
            module["_keys_and_values"](layer, torch.randn(1, 1, 16), told)
        assert cache.written == [slot]


def test_an_old_transformers_is_one_sentence(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.51.3")
    with pytest.raises(ImportError, match=r"version 4\.51\.3, but exits need 4\.57 or newer; run "):
        runpy.run_path(to_hf.MODELING)
    for version in ("4.57.0", "5.0.0.dev0"):
        monkeypatch.setattr("transformers.__version__", version)
        assert "WithExits" in runpy.run_path(to_hf.MODELING)


def test_a_pass_leaves_nothing_behind(shipped, tmp_path):
    theirs, _, tokenizer = shipped
    ids = torch.tensor(tokenizer.encode_prompts(["sum 37295"]))
    theirs.exit_policy = "full"
    with torch.no_grad():
        plain = theirs.model(ids).last_hidden_state
        shallow = theirs(ids, depths=1)
        assert torch.equal(theirs.model(ids).last_hidden_state, plain)
    assert (shallow.depths == 1).all() and not torch.equal(theirs(ids).logits, shallow.logits)
    copy.deepcopy(theirs)  # which a kept graph of gradients would forbid
    # What is saved again has the exits, in float32 whatever the rest is cast to.
    theirs.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(ids, depths=1).logits, shallow.logits)
    again.to(torch.bfloat16)
    assert {tensor.dtype for tensor in again.exits.buffers()} == {torch.float32}
    bare = AutoModelForCausalLM.from_config(again.config, trust_remote_code=True)
    assert bare(ids).logits.shape == shallow.logits.shape


def test_depths_end_where_a_row_ends(shipped):
    theirs, _, tokenizer = shipped
    theirs.exit_policy = "threshold:0.5"
    prompts = ["sum 1", "sum 990417"]
    wanted = completed(theirs, tokenizer, prompts)
    theirs.generation_config.eos_token_id = sorted(tokenizer.eos_ids)
    inputs = padded(tokenizer, prompts) | {"do_sample": False, "max_new_tokens": 64}
    given = GenerationConfig(pad_token_id=tokenizer.pad_id)
    theirs.generate(**inputs, generation_config=given)
    assert [[d for d in row if d] for row in theirs.last_depths.tolist()] == [d for _, d in wanted]
    # A stop string ends a row before its end token.
    theirs.generate(
        **inputs, pad_token_id=tokenizer.pad_id, stop_strings=["####"],
        tokenizer=tokenizer.backend,
    )  # fmt: skip
    lengths = [
        next(n for n in range(len(tokens)) if "####" in tokenizer.decode(tokens[:n]))
        for tokens, _ in wanted
    ]
    assert lengths[0] < lengths[1]
    assert (theirs.last_depths > 0).sum(dim=1).tolist() == lengths
    theirs.exit_policy = "full"


def test_wrong_policies_and_beams_are_one_sentence(shipped):
    theirs, _, tokenizer = shipped
    for policy in ("often", "fixed:5", "fixed:x", "threshold:2", "threshold:nan"):
        with pytest.raises(ValueError, match=f"exit_policy is '{policy}', but it must be full, "):
            theirs.exit_policy = policy
    with pytest.raises(ValueError, match="do not support beam search; set num_beams=1"):
        theirs.generate(**padded(tokenizer, ["sum 1"]), num_beams=2)
    for name, value in {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 3}.items():
        with pytest.raises(ValueError, match=f"{name} is set, but exits need exactly one pass"):
            theirs.generate(**padded(tokenizer, ["sum 1"]), **{name: value})
    theirs.exit_policy = "fixed:2"
    with pytest.raises(ValueError, match="'fixed:2' needs the cache; leave use_cache out"):
        theirs.generate(**padded(tokenizer, ["sum 1"]), use_cache=False)
    for depths in (0, 5, 99, 2.7):
        said = f"contains {depths}, but each depth must be one of 1, 2, 3, 4, 6, 8 "
        with pytest.raises(ValueError, match=said):
            theirs(torch.tensor([[5, 6]]), depths=depths)
    theirs.exit_policy = "full"
