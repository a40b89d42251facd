# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring a run with Orbax."""

import pathlib
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of a run, the newest two of which are kept.

    A checkpoint appears under its name only when it is complete, so that a run may be killed at
    any time.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]) -> None:
        """Opens the folder; `identity` is what makes checkpoints usable for this run."""
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, enable_async_checkpointing=False
            ),
        )

    def clear(self) -> None:
        """Deletes those of an earlier run."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def save(self, step: int, state: Any) -> None:
        """Writes the state after `step` steps, unless it is there."""
        if step not in self._manager.all_steps():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_by_path(state)),
                    identity=ocp.args.JsonSave(self._identity),
                ),
            )

    def restore(self, state: State) -> tuple[int, State]:
        """The newest checkpoint, placed on devices like `state`.

        Returns:
            The number of steps done and the state after them; 0 and `state` if there is none.

        Raises:
            ValueError: the checkpoint is of a run with other options.
        """
        step = self._manager.latest_step()
        if step is None:
            return 0, state
        saved = self._manager.restore(
            step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
        )["identity"]
        other = [
            f"--{name.replace('_', '-')} {saved.get(name)} (now {value})"
            for name, value in self._identity.items()
            if saved.get(name) != value
        ]
        if other:
            raise ValueError(
                f"argument --resume: the checkpoint of step {step} is of a run with "
                f"{', '.join(other)}; allowed: the same options, or another --out"
            )
        # Not by jax.tree.map, which returns the names sorted, in another order than the leaves.
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _by_path(state).items()
        }
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return step, jax.tree.unflatten(jax.tree.structure(state), [arrays[k] for k in abstract])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()


def _by_path(state: Any) -> dict[str, jax.Array]:
    """The leaves by name, so that files do not depend on the classes that hold the arrays."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
