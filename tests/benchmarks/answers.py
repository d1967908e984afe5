"""Wall time a problem: a trained model under its policy, the initial one, and transformers.

    python tests/benchmarks/answers.py --model runs/smollm2-rl/RUN --initial runs/smollm2-trunk \
        --task word_problems --batch 16 [--problems 64] [--policy sample]

Test problems of a task, greedy tokens, answers to their end. Three alternatives take turns: the
trained model under `--policy`, the initial model at full depth, and the initial model in
transformers (exported by convert.to_hf, float32, as many threads as XLA has). Each gets `--batch`
problems at once: transformers batch after batch, jexit out of a pool of `--pool` batches. Prints
the time per problem and the part of it after the first token, as ratios to transformers (medians
over the turns), with accuracy, tokens and layers per problem. Compilation is not counted. Exits 1
if transformers and jexit do not write the same answers at full depth.
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from decode import in_turns, left_padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the trained model")
    parser.add_argument("--initial", required=True, help="directory of the model at the beginning")
    parser.add_argument("--task", default="word_problems")
    parser.add_argument("--path", default="", help="of the task's files")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pool", type=int, default=1, help="batches under way")
    parser.add_argument("--policy", default="sample", help="such as sample or threshold:0.5")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import torch
    import transformers

    from jexit import Full, Sample, load
    from jexit.config import EngineSize, TaskConfig
    from jexit.loops.setup import load_task
    from jexit.model.policies import policy_of
    from jexit.rollout import rollout

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    task = load_task(TaskConfig(name=arguments.task, path=arguments.path), "test")
    problems = [task.problem("test", index) for index in range(arguments.problems)]
    trained, tokenizer = load(arguments.model, dtype="float32")
    initial, _ = load(arguments.initial, dtype="float32")
    prompts = tokenizer.encode_prompts([problem.prompt for problem in problems])
    early = policy_of(arguments.policy, Sample.trained(trained.exit_head))
    at_once, texts, layers = arguments.batch * arguments.pool, {}, {}

    def ours(run_of: tuple[str, int], model, policy):
        size = EngineSize(rows=at_once, tick_rows=arguments.batch)

        def run() -> None:
            texts[run_of], depths = [], []
            for start in range(0, len(prompts), at_once):
                found = rollout(
                    model, prompts[start : start + at_once], policy=policy, temperature=0.0,
                    max_new_tokens=run_of[1], eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
                    key=0, size=size,
                )  # fmt: skip
                for row in range(found.rows):
                    completion = found.completion(row)
                    texts[run_of].append(completion)
                    depths.append(int(np.sum(found.depths_BT[row, : len(completion)])))
            layers[run_of] = float(np.mean(depths))

        return run

    with tempfile.TemporaryDirectory() as directory:
        target = pathlib.Path(directory) / "hf"
        command = [sys.executable, "-m", "convert.to_hf", f"--source={arguments.initial}"]
        subprocess.run([*command, f"--target={target}", "--adapter=merge"], check=True)
        exported = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    exported.eval()

    def theirs(run_of: tuple[str, int]):
        settings = transformers.GenerationConfig(
            max_new_tokens=run_of[1], do_sample=False, pad_token_id=tokenizer.pad_id,
            eos_token_id=sorted(tokenizer.eos_ids),
        )  # fmt: skip

        @torch.inference_mode()
        def run() -> None:
            texts[run_of] = []
            for start in range(0, len(prompts), arguments.batch):
                ids, mask = left_padded(prompts[start : start + arguments.batch], tokenizer.pad_id)
                out = exported.generate(ids, attention_mask=mask, generation_config=settings)
                texts[run_of] += [to_its_end(row, tokenizer.eos_ids) for row in
                                 out[:, ids.shape[1] :].tolist()]  # fmt: skip

        return run

    alternatives = {
        "transformers": theirs,
        "jexit, full depth": functools.partial(ours, model=initial, policy=Full()),
        f"jexit, {arguments.policy}": functools.partial(ours, model=trained, policy=early),
    }
    new = arguments.max_new_tokens
    runs = {
        (label, tokens): alternative((label, tokens))
        for label, alternative in alternatives.items()
        for tokens in (1, new)
    }
    seconds = {run: turns[:, 0] for run, turns in in_turns(runs, arguments.repeats).items()}
    print(
        f"\n{len(problems)} problems of {arguments.task}, {arguments.batch} at once, greedy tokens"
    )
    print(
        f"{'':<24}{'time per problem':>18}{'after 1 token':>15}{'correct':>9}{'tokens':>8}"
        f"{'layers per problem':>20}"
    )
    whole, decoding = (
        {label: seconds[label, new] - counted * seconds[label, 1] for label in alternatives}
        for counted in (0, 1)
    )
    for label in alternatives:
        ratios = (np.median(times[label] / times["transformers"]) for times in (whole, decoding))
        answers = [tokenizer.decode(text) for text in texts[label, new]]
        pairs = zip(problems, answers, strict=True)
        correct = np.mean([task.verify(problem, answer).correct for problem, answer in pairs])
        tokens = np.mean([len(text) for text in texts[label, new]])
        depth = f"{layers[label, new]:.1f}" if (label, new) in layers else ""
        print(
            f"{label:<24}{next(ratios):>18.2f}{next(ratios):>15.2f}{correct:>9.1%}{tokens:>8.1f}"
            f"{depth:>20}"
        )
    theirs_full, ours_full = (texts[label, new] for label in [*alternatives][:2])
    equal = np.mean([a == b for a, b in zip(theirs_full, ours_full, strict=True)])
    print(f"equal answers of transformers and jexit at full depth: {equal:.1%}", flush=True)
    sys.exit(0 if equal > 0.98 else 1)


def to_its_end(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """`tokens` up to the first end token, which it keeps."""
    ends = [index for index, token in enumerate(tokens) if token in eos_ids]
    return tokens[: ends[0] + 1] if ends else tokens


if __name__ == "__main__":
    main()
