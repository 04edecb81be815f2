"""A resumable on-disk cache of teacher pairs (x_t, x̂_r), built shard by shard by any number of processes."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from cmlib.data import to_float
from cmlib.files import sha256, write_atomically, write_json
from cmlib.ops import expand_like, indexed_integers, indexed_normal
from cmlib.teacher import SOLVERS, Teacher

SHARD = 1000  # pairs
WINDOW_BYTES = 256 * 2**20  # how much of a cache the loader shuffles at once
_T, _EPS, _STEP = 0, 1, 2  # noise streams: which level, x_t's noise, the ancestral step's noise


class PairCache:
    """`len(cache)` pairs in a folder of `manifest.json` and `shard-00000.pt` …; see `build` and `open`.

    A shard holds float16 `x_t`, `x_r` in the chain's coordinates, int16 `t`, `r` (indices; −1 is the clean image) and
    int64 `index`; rollout shards also hold each trajectory's `x_end` once. Readers get float32 EDM coordinates and σ.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            self.key, self.sigmas, self.shards = manifest["key"], torch.tensor(manifest["sigmas"]), manifest["shards"]
        except FileNotFoundError:
            raise ValueError(f"no pair cache at {self.folder}; build one with `cmlib cache build`") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'manifest.json'} is damaged; delete that file and build again") from error
        self._loaded: dict[int, dict[str, Tensor]] = {}

    # ---- building

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: Teacher,
        pairs: int,
        source: str = "data",
        images: Tensor | None = None,
        solver: str = "posterior_mean",
        delta: int = 1,
        steps: int = 40,
        shape: tuple[int, int, int] | None = None,
        seed: int = 0,
        batch_size: int = 250,
    ) -> PairCache:
        """Build, resume or repair the cache in `folder`; killed at any point, the same call goes on where it stopped.

        `data` (the brief): image i noised to a uniform index t, one reverse step of `solver` to t − `delta`; needs uint8
        `images`. `rollout`: trajectories of the teacher from noise in `steps` steps, a pair a step, with their endpoints;
        needs the image `shape`. The result depends on the arguments alone, not on who built which shard.
        Raises ValueError on bad arguments or a folder that holds another cache, OSError when the disk is full.
        """
        if source not in ("data", "rollout"):
            raise ValueError(f"source must be 'data' or 'rollout', got {source!r}")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if source == "data" and (images is None or len(images) == 0):
            raise ValueError("source 'data' needs images")
        if source == "rollout" and (shape is None or solver not in ("ddim", "heun", "ancestral")):
            raise ValueError("source 'rollout' needs the image shape and a solver that ends on an image: ddim, heun, ancestral")
        if pairs < 1 or batch_size < 1 or not 1 <= delta <= teacher.process.T or not 1 <= steps <= teacher.process.T:
            raise ValueError(f"pairs, batch size, delta and steps must be positive and at most T={teacher.process.T}")
        key: dict[str, Any] = {"version": 1, "source": source, "solver": solver, "seed": seed, "batch_size": batch_size}
        key |= {"teacher": teacher.hash(), "schedule": teacher.process.name, "T": teacher.process.T}
        if source == "data":
            assert images is not None
            digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:12]
            key |= {"pairs": pairs, "delta": delta, "images": digest, "shape": list(images.shape[1:])}
        else:
            per_shard = max(1, SHARD // steps) * steps
            key |= {"pairs": -(-pairs // steps) * steps, "steps": steps, "shape": list(shape or ()), "shard": per_shard}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "manifest.lock"):
            if (folder / "manifest.json").exists():
                cls(folder)._check(key)
            else:
                manifest = {"key": key, "sigmas": teacher.process.sigma(torch.arange(teacher.process.T)).tolist(), "shards": {}}
                write_json(folder / "manifest.json", manifest)
        cache = cls(folder)
        cache._work(teacher, images)
        return cls.open(folder)

    def _check(self, expected: dict[str, Any]) -> None:
        differs = [f"{k} is {self.key.get(k)!r}, not {v!r}" for k, v in expected.items() if self.key.get(k) != v]
        if differs:
            raise ValueError(f"stale cache in {self.folder}: {'; '.join(differs)}. Give another --out or delete that folder.")

    @property
    def per_shard(self) -> int:
        """Pairs in every shard but the last."""
        return self.key.get("shard", SHARD)

    @property
    def n_shards(self) -> int:
        """Number of shards when complete."""
        return -(-len(self) // self.per_shard)

    def path(self, shard: int) -> Path:
        """File of one shard."""
        return self.folder / f"shard-{shard:05d}.pt"

    def _groups(self) -> list[list[int]]:
        """Shards that are computed together: enough trajectories to fill the teacher's batch."""
        trajectories = self.per_shard // self.key["steps"] if self.key["source"] == "rollout" else self.key["batch_size"]
        size = max(1, self.key["batch_size"] // trajectories)
        return [list(range(i, min(i + size, self.n_shards))) for i in range(0, self.n_shards, size)]

    def _work(self, teacher: Teacher, images: Tensor | None) -> None:
        """Compute every shard that is missing, damaged or of an older teacher; share the work through lock files."""
        todo = [group for group in self._groups() if not all(map(self._is_good, group))]
        total, waiting = sum(map(len, self._groups())), False
        bar = tqdm(total=total, initial=total - sum(map(len, todo)), desc="cache", unit="shard", disable=None)
        while todo:
            group = todo.pop(0)
            try:
                with FileLock(self.folder / f"group-{group[0]:05d}.lock", timeout=0):
                    self.shards = PairCache(self.folder).shards
                    missing = [s for s in group if not self._is_good(s)]
                    if missing:
                        contents = self._compute(teacher, images, group)
                        for shard in missing:
                            self._store(shard, contents[shard])
                bar.update(len(group))
                waiting = False
            except Timeout:  # another process has it; come back, as it may die
                todo.append(group)
                if waiting:
                    time.sleep(0.05)
                waiting = True
        bar.close()
        for lock in self.folder.glob("group-*.lock"):
            lock.unlink(missing_ok=True)

    def _is_good(self, shard: int) -> bool:
        entry = self.shards.get(str(shard))
        path = self.path(shard)
        current = entry is not None and entry["teacher"] == self.key["teacher"]
        return current and path.exists() and sha256(path) == entry["sha256"]

    def _store(self, shard: int, content: dict[str, Tensor]) -> None:
        try:
            write_atomically(self.path(shard), lambda file: torch.save(content, file))
            with FileLock(self.folder / "manifest.lock"):
                manifest = json.loads((self.folder / "manifest.json").read_text())
                manifest["shards"][str(shard)] = {"sha256": sha256(self.path(shard)), "teacher": self.key["teacher"]}
                write_json(self.folder / "manifest.json", manifest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            done = f"{len(PairCache(self.folder).shards)} of {self.n_shards} shards are safe"
            raise OSError(error.errno, f"disk full in {self.folder}: {done}; free space and run it again") from error

    def _compute(self, teacher: Teacher, images: Tensor | None, group: list[int]) -> dict[int, dict[str, Tensor]]:
        if self.key["source"] == "rollout":
            return self._roll_out(teacher, group)
        assert images is not None and group == group[:1]
        seed, first = self.key["seed"], group[0] * SHARD
        item = torch.arange(first, min(first + SHARD, len(self)))
        index = item % len(images)
        n = indexed_integers(seed, item, 0, teacher.process.T, _T)
        eps = indexed_normal(seed, item, self.key["shape"], _EPS)
        x_t = teacher.process.perturb(to_float(images[index]), eps, n).half()
        return {group[0]: self._targets(teacher, {"x_t": x_t, "t": n.short(), "index": index, "item": item})}

    def _targets(self, teacher: Teacher, shard: dict[str, Tensor]) -> dict[str, Tensor]:
        """x̂_r of a `data` shard, from its stored x_t."""
        n, x_t, item = shard["t"].long(), shard["x_t"].float(), shard["item"]
        r = (n - self.key["delta"]).clamp(min=-1)
        rows = []
        for part in torch.arange(len(n)).split(self.key["batch_size"]):
            noise = None
            if self.key["solver"] == "ancestral":
                noise = indexed_normal(self.key["seed"], item[part], self.key["shape"], _STEP).to(teacher.device)
            x, a, b = (v[part].to(teacher.device) for v in (x_t, n, r))
            rows.append(teacher.step(x, a, b, self.key["solver"], noise).half().cpu())
        return {**shard, "x_r": torch.cat(rows), "r": r.short()}

    def _roll_out(self, teacher: Teacher, group: list[int]) -> dict[int, dict[str, Tensor]]:
        steps, seed = self.key["steps"], self.key["seed"]
        first, end = group[0] * self.per_shard // steps, min((group[-1] + 1) * self.per_shard, len(self)) // steps
        trajectory = torch.arange(first, end)
        levels = [*teacher.process.grid(steps).flip(0).tolist(), -1]
        x = indexed_normal(seed, trajectory, self.key["shape"], _EPS).to(teacher.device)
        states = [x.half().cpu()]
        for k, (n, r) in enumerate(zip(levels, levels[1:], strict=False)):
            noise = None
            if self.key["solver"] == "ancestral":
                noise = indexed_normal(seed, trajectory, self.key["shape"], _STEP + k).to(teacher.device)
            at, to = torch.full((len(x),), n, device=x.device), torch.full((len(x),), r, device=x.device)
            x = teacher.step(x, at, to, self.key["solver"], noise)
            states.append(x.half().cpu())
        path = torch.stack(states, 1)  # [trajectories,steps+1,C,H,W]
        n = torch.tensor(levels, dtype=torch.int16).expand(len(path), -1)
        flat = {"x_t": path[:, :-1], "x_r": path[:, 1:], "t": n[:, :-1], "r": n[:, 1:]}
        flat["index"] = trajectory[:, None].expand(-1, steps)
        per = self.per_shard // steps
        return {
            shard: {k: v[i * per : (i + 1) * per].flatten(0, 1).clone() for k, v in flat.items()}
            | {"x_end": path[i * per : (i + 1) * per, -1].clone()}
            for i, shard in enumerate(group)
        }

    # ---- keeping

    @classmethod
    def open(cls, folder: str | Path, teacher: Teacher | None = None) -> PairCache:
        """Open a finished cache. Raises ValueError with what to do if it is not finished, or not of `teacher`."""
        cache = cls(folder)
        if teacher is not None:
            cache._check({"teacher": teacher.hash()})
        done = [s for s, entry in cache.shards.items() if entry["teacher"] == cache.key["teacher"]]
        missing = cache.n_shards - sum(cache.path(int(s)).exists() for s in done)
        if missing:
            raise ValueError(f"{missing} of {cache.n_shards} shards in {folder} are missing; run the build (or refresh) again")
        return cache

    def verify(self) -> list[int]:
        """Numbers of the shards whose bytes differ from the manifest's SHA-256, or that are missing; `build` repairs them."""
        return [s for s in range(self.n_shards) if not self._is_good(s)]

    def refresh(self, teacher: Teacher) -> PairCache:
        """Recompute every x̂_r with a new teacher; x_t stays as it is (the brief's step 3). Killed, call it again.

        Only for source `data`: a rollout's states are the teacher's own, so those are built anew.
        """
        if self.key["source"] != "data":
            raise ValueError("a rollout cache follows its teacher from its first state; build a new one")
        if not torch.equal(teacher.process.sigma(torch.arange(teacher.process.T)), self.sigmas):
            raise ValueError("the new teacher's noise schedule differs from the cache's; build a new cache")
        with FileLock(self.folder / "manifest.lock"):
            manifest = json.loads((self.folder / "manifest.json").read_text())
            manifest["key"]["teacher"] = self.key["teacher"] = teacher.hash()
            write_json(self.folder / "manifest.json", manifest)
        for shard in tqdm(range(self.n_shards), desc="refresh", unit="shard", disable=None):
            if self._is_good(shard):
                continue
            entry = self.shards.get(str(shard))
            if entry is None or not self.path(shard).exists() or sha256(self.path(shard)) != entry["sha256"]:
                raise ValueError(f"shard {shard} of {self.folder} is damaged; run the build again before refreshing")
            old = torch.load(self.path(shard), weights_only=True)
            self._store(shard, self._targets(teacher, old))
        return PairCache.open(self.folder)

    # ---- reading

    def __len__(self) -> int:
        return self.key["pairs"]

    def _read(self, shard: int) -> dict[str, Tensor]:
        """One shard, its checksum checked at the first reading; as many stay in memory as one window holds."""
        if shard not in self._loaded:
            entry = self.shards[str(shard)]
            if sha256(self.path(shard)) != entry["sha256"]:
                raise ValueError(f"shard {shard} of {self.folder} is damaged; run the same build again to repair it")
            while len(self._loaded) >= self._window:
                self._loaded.pop(next(iter(self._loaded)))
            content = torch.load(self.path(shard), weights_only=True)
            if "x_end" in content:
                content["x_end"] = content["x_end"][content["index"] - content["index"][0]]
            self._loaded[shard] = content
        return self._loaded[shard]

    @property
    def _window(self) -> int:
        return max(1, WINDOW_BYTES // (6 * self.per_shard * int(np.prod(self.key["shape"]))))

    def _decode(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Chain coordinates and indices as stored -> EDM coordinates and σ."""
        out = {"index": rows["index"], "n": rows["t"].long()}
        for x, t in (("x_t", "t"), ("x_r", "r")):
            n = rows[t].long()
            out[t] = torch.where(n >= 0, self.sigmas[n.clamp(min=0)], 0.0)
            out[x] = rows[x].float() * expand_like((1 + out[t] ** 2).sqrt(), rows[x])
        if "x_end" in rows:
            out["x_end"] = rows["x_end"].float()
        return out

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        shard, row = divmod(i % len(self), self.per_shard)
        return {k: v[0] for k, v in self._decode({k: v[row : row + 1] for k, v in self._read(shard).items()}).items()}

    def loader(self, batch_size: int, seed: int = 0, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless shuffled batches of x_t, t, x_r, r [and x_end], n, index, from batch `start` of the stream on.

        Each epoch shuffles the shards, then the pairs within windows of at most 256 MiB.
        """
        names = [k for k in self._read(0) if k != "item"]
        for epoch in range(10**9):
            rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            shards = rng.permutation(self.n_shards)
            for window in np.array_split(shards, -(-self.n_shards // self._window)):
                size = sum(min(self.per_shard, len(self) - int(s) * self.per_shard) for s in window)
                batches = max(1, size // batch_size)
                order = torch.from_numpy(rng.permutation(size))
                if start >= batches:
                    start -= batches
                    continue
                parts = [self._read(int(s)) for s in window]
                rows = {k: torch.cat([p[k] for p in parts]) for k in names}
                for b in range(start, batches):
                    part = order[b * batch_size : (b + 1) * batch_size]
                    yield self._decode({k: v[part] for k, v in rows.items()})
                start = 0
