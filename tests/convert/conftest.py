"""Small checkpoints on disk, and how a command line is run and checked."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.config import PROJECTIONS, ExitSettings, LoRA
from jexit.io.model_dir import save_model

EXITS = (1, 3)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """`checkpoints(family)`: a directory that transformers wrote; made once."""
    pytest.importorskip("torch")
    import hf_models

    made = {}

    def of(family: str) -> pathlib.Path:
        if family not in made:
            model = hf_models.make_model(family, tie_word_embeddings=family == "qwen3")
            made[family] = hf_models.save(tmp_path_factory.mktemp(family) / "hf", model)
        return made[family]

    return of


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the Qwen2 checkpoint to break."""
    return pathlib.Path(shutil.copytree(checkpoints("qwen2"), tmp_path / "source"))


@pytest.fixture(scope="session")
def students(checkpoints, tmp_path_factory):
    """`students(family, rank)`: a model with trained adapters and heads, and its directory.

    With a rank it has a linear continuation, too (0: full matrices).
    """
    made = {}

    def of(family: str, rank: int | None = None):
        if (family, rank) not in made:
            linear = {"continuation": "linear", "continuation_rank": rank}
            head = ExitSettings() if rank is None else ExitSettings(**linear)
            base = checkpoints(family)
            lora = LoRA(rank=3, alpha=5.0, dropout=0.1, targets=PROJECTIONS)
            model, tokenizer = jexit.load(base, exit_layers=EXITS, exit_head=head, lora=lora)
            rng = np.random.default_rng(0)

            def spread(path, value):
                names = [str(getattr(key, "key", key)) for key in path]
                trained = names[0] == "exits" or names[-2].startswith("lora")
                noise = rng.normal(0.0, 0.2, value.shape).astype(np.float32)
                if "continuation" in names:
                    return value + 0.5 * noise
                return value + noise if trained else value

            nnx.update(model, jax.tree_util.tree_map_with_path(spread, nnx.state(model)))
            directory = tmp_path_factory.mktemp("student") / f"{family}-{rank}"
            save_model(directory, model, tokenizer, base=base)
            made[family, rank] = model, directory
        return made[family, rank]

    return of


@pytest.fixture
def refuses(capsys, tmp_path):
    """Runs a command's `main`, which must fail with one line on stderr and write nothing."""

    def run(main, source, *options, target=None) -> str:
        target = tmp_path / "target" if target is None else target
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([f"--source={source}", f"--target={target}", *options]) != 0
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("jexit: ") and err.count("\n") == 1 and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run
