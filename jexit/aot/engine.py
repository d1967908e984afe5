"""The jitted programs of the decoding engine, each with abstract arguments of the largest shapes.

Abstract arguments have shapes, dtypes and shardings, but no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jexit.aot.program import Program, abstract_key, placed, placed_parameters, rows
from jexit.config import Config
from jexit.dist import gathered_width
from jexit.model.cache import Cache, cache_bucket, token_bytes
from jexit.model.policies import Policy
from jexit.rollout.pool import empty, grown
from jexit.rollout.prefill import ForcedPrefix, prefill
from jexit.rollout.sampling import Draws, Sampling
from jexit.rollout.scheduling import Layout, columns_bucket
from jexit.rollout.ticks import COPY_SCOPE, FILL_SCOPE, LAYERS_SCOPE, advance
from jexit.steps.state import SplitModel


class EnginePrograms:
    """The jitted programs of decoding: gathering weights, prefill, decoding and cache growth.

    `state` is the training state that stays on the devices during decoding, or None.
    """

    def __init__(self, config: Config, mesh: Mesh, split: SplitModel, state: Any) -> None:
        self._mesh, self._split = mesh, split
        self._size = config.engine
        self._longest = config.task.max_prompt_tokens
        self._resident = {"state": state, "fixed": split.fixed}
        self._gathered: set[bool] = set()  # True: the teacher's own weights; False: the student's

    def programs(
        self,
        name: str,
        prompts: int,
        samples: int,
        new: int,
        policies: list[tuple[str, Policy]],
        *,
        adapters: bool = True,
        forced: int = 0,
    ) -> Iterator[Program]:
        """Yields the programs that decode `samples` completions for each of `prompts` prompts.

        There is one prefill program and, for each policy, one program that decodes a token with the
        largest cache. A program that gathers the weights comes first, and one that enlarges the
        cache to its final size comes last, if the run needs these. A completion has a forced prefix
        of up to `forced` tokens, which exit under the first policy, and then `new` tokens.
        `policies` contains pairs (label, policy). The names of all programs begin with `name`.
        Without `adapters`, the teacher decodes.
        """
        split, mesh = self._split, self._mesh
        model = split.student(split.trainable)
        layers = model.arch.layers
        own_teacher = split.fixed.teacher is not None and not adapters
        trunk = split.fixed.teacher if own_teacher else split.trainable
        held = (trunk, split.fixed.frozen)
        layout = Layout.of(
            np.full(prompts, self._longest + forced),
            samples,
            self._size,
            token_bytes=token_bytes(model.arch, model.dtype),
            new=new,
        )
        shards, most = layout.shards, layout.prompt_slots + new - 1
        states, resident = held, self._resident
        if mesh.shape["fsdp"] > 1:
            states = placed_parameters(held, mesh, whole_width=True)
            if own_teacher not in self._gathered:
                self._gathered.add(own_teacher)
                yield Program(
                    name=f"{name} weights, gathered over fsdp",
                    function=gathered_width,
                    arguments=(held,),
                    resident=self._resident,
                )
        sizes = {
            "rows": shards * layout.rows,
            "jobs": shards * layout.jobs,
            "prefixes": shards * layout.prefixes,
            "columns": columns_bucket(new),
            "prompt_slots": layout.prompt_slots,
            "slots": cache_bucket(most, most),
            "hazards": False,
        }
        pool, records, prefixes = self._by_rows(
            jax.eval_shape(lambda states: empty(split.graphdef, states, **sizes), states)
        )
        jobs = jax.tree.map(lambda part: rows(mesh, *part.shape), layout.jobs_from(0))
        eos, most_new = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), ()))
        draws = Draws(abstract_key(), eos, most_new, Sampling.of(1.0, 1.0))
        group = shards * max(group.rows for group in layout.groups.values())
        batch = (
            rows(mesh, group, layout.prompt_slots), rows(mesh, group), rows(mesh, group, samples)
        )  # fmt: skip
        depths = rows(mesh, shards * layout.jobs, columns_bucket(new + forced))
        placed_policies = [(label, policy.map_rows(lambda _: depths)) for label, policy in policies]
        prefix = None
        if forced:
            prefix = ForcedPrefix(rows(mesh, group), rows(mesh, group), placed_policies[0][1])
        yield Program(
            name=f"{name} prefill",
            function=prefill,
            arguments=(split.graphdef, states, prefixes, records, jobs, *batch, draws, prefix),
            options={"adapters": adapters},
            resident=resident | {"pool": pool},
        )
        if new == 1:  # the prefill draws this token, so no tick runs
            return
        ready, more = rows(mesh, shards), rows(mesh, shards, dtype=jnp.bool)
        for label, policy in placed_policies:
            yield Program(
                name=f"{name} decode{label}, a token",
                function=advance,
                arguments=(
                    split.graphdef, states, None, pool, records, prefixes, jobs, ready, more,
                    np.int32(1), policy, draws,
                ),
                options={"tick_rows": layout.tick_rows, "adapters": adapters, "hazards": False},
                loops={LAYERS_SCOPE: layers, FILL_SCOPE: 0, COPY_SCOPE: 0},
                resident=resident,
                note=f"{name} decode: each data shard has up to {layout.rows} completions in "
                f"progress and runs {layout.tick_rows} of them per tick",
            )  # fmt: skip
        held = resident | {"states": states, "records": records, "prefixes": prefixes}
        yield from self._growth(name, layout, most, pool.cache, held)

    def _by_rows(self, tree: Any) -> Any:
        """Returns the abstract arrays of `tree` with their rows sharded over the data axes."""

        def place(part: Any) -> Any:
            if isinstance(part, Cache):
                return jax.tree.map(lambda leaf: placed(leaf, self._mesh, "K.B.."), part)
            return rows(self._mesh, *part.shape, dtype=part.dtype)

        return jax.tree.map(place, tree, is_leaf=lambda part: isinstance(part, Cache))

    def _growth(
        self, name: str, layout: Layout, most: int, cache: Cache, resident: Any
    ) -> Iterator[Program]:
        """Yields the program that grows the cache to its final size, unless this is its first size.

        `most` is the number of slots that a row needs at the end.
        """
        slots, smaller = cache.slots, layout.first_slots(most)
        if smaller >= slots:
            return
        while (larger := cache_bucket(smaller + 1, most)) < slots:
            smaller = larger

        def with_slots(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*part.shape[:3], smaller, part.shape[4])
            return jax.ShapeDtypeStruct(shape, part.dtype, sharding=part.sharding)

        before = jax.tree.map(with_slots, cache)
        yield Program(
            name=f"{name} cache, {smaller} → {slots} slots",
            function=grown,
            arguments=(before,),
            options={"slots": slots},
            resident=resident,
        )
