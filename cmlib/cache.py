"""A resumable on-disk cache of teacher pairs (x_t, x̂_r), built shard by shard by any number of processes."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from cmlib.data import to_float
from cmlib.files import explained, read_sealed, sha256, write_atomically, write_sealed
from cmlib.ops import expand_like, indexed_integers, indexed_normal
from cmlib.teacher import SOLVERS, Teacher
from cmlib.unet import balanced, classes

SHARD = 1000  # pairs
WINDOW_BYTES = 256 * 2**20  # how much of a cache the loader shuffles at once
_T, _EPS, _STEP = 0, 1, 2  # noise streams: which level, x_t's noise, the ancestral step's noise


class PairCache:
    """`len(cache)` pairs in a folder of `manifest.json` and `shard-00000.pt` …; see `build` and `open`.

    A shard holds float16 `x_t`, `x_r` in the chain's coordinates, int16 `t`, `r` (indices; −1 is the clean image) and
    int64 `index`; rollout shards also hold each trajectory's `x_end` once. Readers get float32 EDM coordinates and σ.
    Files are written under one lock, each whole or not at all; the manifest is written last and says which of them count.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").exists():
            raise ValueError(f"no pair cache at {self.folder}; build one with `cmlib cache build`")
        manifest = read_sealed(self.folder / "manifest.json")
        self.key, self.sigmas, self.shards = manifest["key"], torch.tensor(manifest["sigmas"]), manifest["shards"]
        self.per_shard: int = self.key["shard"]  # the last may hold less
        self.n_shards = -(-len(self) // self.per_shard)
        self._window = max(1, WINDOW_BYTES // (6 * self.per_shard * math.prod(self.key["shape"])))  # shards
        self._loaded: dict[int, dict[str, Tensor]] = {}

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
        `images` [N,C,H,W]. `rollout`: trajectories of the teacher from noise in `steps` steps, a pair a step, with their
        endpoints; needs the image `shape`; `pairs` is rounded up to whole trajectories. The result depends on the arguments
        alone, not on who built which shard; `batch_size` is one of them, as a network's last bits vary with it.
        Raises ValueError on bad arguments, a folder that holds another cache or a teacher that gives NaN, OSError when a
        file cannot be written (disk full, read-only).
        """
        chain = f"T={teacher.process.T}, σ {teacher.process.sigma_min:.4g} … {teacher.process.sigma_max:.4g}"
        key: dict[str, Any] = {"version": 1, "teacher": teacher.hash(), "schedule": chain, "source": source}
        key |= {"solver": solver, "pairs": pairs, "delta": delta, "steps": steps, "seed": seed, "batch_size": batch_size}
        key = _checked(key, teacher, images, shape)
        with explained(folder := Path(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if (folder / "manifest.json").exists():
                    cls(folder)._check(key)
                else:
                    sigmas = teacher.process.sigma(torch.arange(teacher.process.T)).tolist()
                    write_sealed(folder / "manifest.json", {"key": key, "sigmas": sigmas, "shards": {}})
            cls(folder)._work(teacher, images)
        return cls.open(folder)

    def _check(self, expected: dict[str, Any]) -> None:
        differs = [f"{k} is {self.key.get(k)!r}, not {v!r}" for k, v in expected.items() if self.key.get(k) != v]
        if differs:
            raise ValueError(f"stale cache in {self.folder}: {'; '.join(differs)}. Give another --out or delete that folder.")

    def _items(self, shard: int) -> range:
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, len(self)))

    def path(self, shard: int) -> Path:
        """File of one shard."""
        return self.folder / f"shard-{shard:05d}.pt"

    def _work(self, teacher: Teacher, images: Tensor | None) -> None:
        """Compute every shard that is missing, damaged or of an older teacher; share the work through lock files.

        Deleting those at the end is safe: at worst two processes compute one group, and write the same bytes.
        """
        size = max(1, self.key["batch_size"] * self.key.get("steps", 0) // self.per_shard)  # trajectories that fill a batch
        groups = [range(i, min(i + size, self.n_shards)) for i in range(0, self.n_shards, size)]
        todo = [group for group in groups if not all(map(self._is_good, group))]
        done = self.n_shards - sum(map(len, todo))
        with tqdm(total=self.n_shards, initial=done, desc="cache", unit="shard", disable=None) as bar:
            while todo:
                group = todo.pop(0)
                try:
                    with FileLock(self.folder / f"group-{group[0]:05d}.lock", timeout=0):
                        self.shards = PairCache(self.folder).shards
                        missing = [s for s in group if not self._is_good(s)]
                        for shard, content in self._compute(teacher, images, group) if missing else ():
                            if shard in missing:
                                self._store(shard, content)
                    bar.update(len(group))
                except Timeout:  # another process has it; come back, as it may die
                    todo.append(group)
                    time.sleep(0.05)
        for lock in self.folder.glob("group-*.lock"):
            with suppress(OSError):  # gone already, or in use on Windows
                lock.unlink()

    def _is_good(self, shard: int, hashed: bool = True) -> bool:
        entry, path = self.shards.get(str(shard)), self.path(shard)
        current = entry is not None and entry["teacher"] == self.key["teacher"] and path.exists()
        return current and (not hashed or sha256(path) == entry["sha256"])

    def _store(self, shard: int, content: dict[str, Tensor]) -> None:
        """Write a shard, then the manifest, under one lock: no reader, kill or other writer finds one without the other."""
        for name, v in content.items():
            if not v.isfinite().all():
                raise ValueError(f"shard {shard} is not stored: its {name} holds NaN or infinity; check the teacher's weights")
        buffer = io.BytesIO()  # in memory first: the hash is of what was meant, not of what the disk made of it
        torch.save(content, buffer)
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        with _locked(self.folder):
            now = PairCache(self.folder)
            if now.key != self.key:
                raise ValueError(f"another process refreshed {self.folder} to teacher {now.key['teacher']} meanwhile")
            entry = now.shards.get(str(shard))
            if entry is not None and entry["sha256"] != digest:  # a kill leaves the old file or the new: name both
                entry["next"] = [*entry.get("next", []), digest]
                now._save()
            write_atomically(self.path(shard), lambda file: file.write(buffer.getbuffer()))
            now.shards[str(shard)] = {"sha256": digest, "teacher": self.key["teacher"]}
            now._save()

    def _save(self) -> None:
        """Write the manifest, its shards in order."""
        shards = dict(sorted(self.shards.items(), key=lambda item: int(item[0])))
        write_sealed(self.folder / "manifest.json", {"key": self.key, "sigmas": self.sigmas.tolist(), "shards": shards})

    def _compute(self, teacher: Teacher, images: Tensor | None, group: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
        if self.key["source"] == "rollout":
            yield from self._roll_out(teacher, group)
            return
        for shard in group:
            item = torch.tensor(self._items(shard))
            content = self._load(shard) if images is None else self._perturbed(teacher, images, item)
            yield shard, {**content, **self._targets(teacher, content, item)}

    def _perturbed(self, teacher: Teacher, images: Tensor, item: Tensor) -> dict[str, Tensor]:
        """What the teacher's step starts from: image i noised to a uniform index."""
        seed, index = self.key["seed"], item % len(images)
        n = indexed_integers(seed, item, 0, teacher.process.T, _T)
        eps = indexed_normal(seed, item, self.key["shape"], _EPS)
        return {"x_t": teacher.process.perturb(to_float(images[index]), eps, n).half(), "t": n.short(), "index": index}

    def _targets(self, teacher: Teacher, content: dict[str, Tensor], item: Tensor) -> dict[str, Tensor]:
        """x̂_r and r, from the stored x_t."""
        n, x_t = content["t"].long(), content["x_t"].float()
        r = (n - self.key["delta"]).clamp(min=-1)
        rows = []
        for part in torch.arange(len(n)).split(self.key["batch_size"]):
            x, a, b = (v[part].to(teacher.device) for v in (x_t, n, r))
            rows.append(teacher.step(x, a, b, self.key["solver"], self._noise(teacher, item[part])).half().cpu())
        return {"x_r": torch.cat(rows), "r": r.short()}

    def _noise(self, teacher: Teacher, item: Tensor, step: int = 0) -> Tensor | None:
        """What an ancestral step adds: [B,C,H,W], keyed by pair or trajectory and step."""
        if self.key["solver"] != "ancestral":
            return None
        return indexed_normal(self.key["seed"], item, self.key["shape"], _STEP + step).to(teacher.device)

    def _roll_out(self, teacher: Teacher, group: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
        steps, per = self.key["steps"], self.per_shard // self.key["steps"]
        levels = [*teacher.process.grid(steps).flip(0).tolist(), -1]
        trajectory = torch.arange(group[0] * per, min((group[-1] + 1) * per, len(self) // steps))
        path = torch.empty(len(trajectory), steps + 1, *self.key["shape"], dtype=torch.float16)
        for rows in torch.arange(len(trajectory)).split(self.key["batch_size"]):
            x = indexed_normal(self.key["seed"], trajectory[rows], self.key["shape"], _EPS).to(teacher.device)
            path[rows, 0] = x.half().cpu()
            for k, (n, r) in enumerate(itertools.pairwise(levels)):
                at, to = (torch.full((len(x),), v, device=x.device) for v in (n, r))
                with balanced(teacher.unet, trajectory[rows]):
                    x = teacher.step(x, at, to, self.key["solver"], self._noise(teacher, trajectory[rows], k))
                path[rows, k + 1] = x.half().cpu()
        n = torch.tensor(levels, dtype=torch.int16).expand(len(path), -1)
        index = trajectory[:, None].expand(-1, steps)
        flat = {"x_t": path[:, :-1], "t": n[:, :-1], "index": index, "x_r": path[:, 1:], "r": n[:, 1:]}
        for i, shard in enumerate(group):
            mine = slice(i * per, (i + 1) * per)
            yield shard, {k: v[mine].flatten(0, 1).clone() for k, v in flat.items()} | {"x_end": path[mine, -1].clone()}

    @classmethod
    def open(cls, folder: str | Path, teacher: Teacher | None = None) -> PairCache:
        """Open a finished cache. Raises ValueError with what to do if it is not finished, or not of `teacher`."""
        cache = cls(folder)
        if teacher is not None:
            cache._check({"teacher": teacher.hash()})
        if missing := sum(not cache._is_good(shard, hashed=False) for shard in range(cache.n_shards)):
            raise ValueError(f"{missing} of {cache.n_shards} shards in {folder} are missing; run the build (or refresh) again")
        return cache

    def verify(self) -> list[int]:
        """Numbers of the shards whose bytes differ from the manifest's SHA-256, or that are missing; `build` repairs them."""
        return [s for s in range(self.n_shards) if not self._is_good(s)]

    def refresh(self, teacher: Teacher) -> PairCache:
        """Recompute every x̂_r with a new teacher; x_t stays as it is (the brief's step 3). Killed, call it again.

        Returns the new cache; this object still describes the old. Only for source `data`: a rollout's states are its
        teacher's own. Raises ValueError, and changes nothing, if schedule or shape differ or a shard is damaged.
        """
        if self.key["source"] != "data":
            raise ValueError("a rollout cache follows its teacher from its first state; build a new one")
        same_shape = list(teacher.image_shape) == list(self.key["shape"])
        if not same_shape or not torch.equal(teacher.process.sigma(torch.arange(teacher.process.T)), self.sigmas):
            raise ValueError("the new teacher's noise schedule or image shape differs from the cache's; build a new cache")
        with explained(self.folder):
            with _locked(self.folder):
                now = PairCache(self.folder)
                for shard in range(now.n_shards):
                    now._load(shard)
                now.key["teacher"] = teacher.hash()
                now._save()
            now._work(teacher, None)
        return PairCache.open(self.folder)

    def __len__(self) -> int:
        return self.key["pairs"]

    def _load(self, shard: int) -> dict[str, Tensor]:
        """A shard with one `x_end` a pair; its checksum is checked before anything in it is decoded."""
        entry, path = self.shards.get(str(shard), {}), self.path(shard)
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() not in (entry.get("sha256"), *entry.get("next", [])):
            mend = f"build it again with teacher {self.key['teacher']}, or open it again if another process refreshed it"
            raise ValueError(f"shard {shard} of {self.folder} is missing or damaged; {mend}")
        content = torch.load(io.BytesIO(data), weights_only=True)
        if "x_end" in content:
            content["x_end"] = content["x_end"][content["index"] - content["index"][0]]
        return content

    def _decode(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Chain coordinates and indices as stored -> EDM coordinates and σ."""
        out = {"index": rows["index"], "n": rows["t"].long()}
        out |= {"label": rows["index"] % self.key["classes"]} if "classes" in self.key else {}
        for x, t in (("x_t", "t"), ("x_r", "r")):
            n = rows[t].long()
            out[t] = torch.where(n >= 0, self.sigmas[n.clamp(min=0)], 0.0)
            out[x] = rows[x].float() * expand_like((1 + out[t] ** 2).sqrt(), rows[x])
        if "x_end" in rows:
            out["x_end"] = rows["x_end"].float()
        return out

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Pair i as the loader gives it, without the batch axis; as many shards stay in memory as one window holds."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        shard, row = divmod(i % len(self), self.per_shard)
        if shard not in self._loaded:
            while len(self._loaded) >= self._window:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[shard] = self._load(shard)
        rows = {k: v[row : row + 1] for k, v in self._loaded[shard].items()}
        return {k: v[0] for k, v in self._decode(rows).items()}

    def loader(self, batch_size: int, seed: int = 0, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Endless shuffled batches of x_t, t, x_r, r [and x_end], n, index, from batch `start` of the stream on.

        Each epoch shuffles the shards, then the pairs within windows of at most 256 MiB, and leaves out what does not fill
        a batch; a window smaller than a batch (as the whole of a small cache may be) is one smaller batch.
        """
        if batch_size < 1 or start < 0:
            raise ValueError(f"batches need a size of at least 1 and a start of at least 0, got {batch_size} and {start}")
        held: list[int] = []
        rows: dict[str, Tensor] = {}
        for epoch in itertools.count():
            rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            for part in np.array_split(rng.permutation(self.n_shards), -(-self.n_shards // self._window)):
                window = sorted(part.tolist())
                size = sum(len(self._items(shard)) for shard in window)
                batches = max(1, size // batch_size)
                order = torch.from_numpy(rng.permutation(size))
                if start >= batches:
                    start -= batches
                    continue
                if window != held:
                    rows.clear()  # the last window goes before the next one comes
                    parts, held = [self._load(shard) for shard in window], window
                    rows = {k: torch.cat([part.pop(k) for part in parts]) for k in list(parts[0])}
                for b in range(start, batches):
                    chosen = order[b * batch_size : (b + 1) * batch_size]
                    yield self._decode({k: v[chosen] for k, v in rows.items()})
                start = 0


def _checked(key: dict[str, Any], teacher: Teacher, images: Tensor | None, shape: Sequence[int] | None) -> dict[str, Any]:
    """Check `build`'s arguments; the key of the cache they describe, without those that its source does not use."""
    T, source, solver, steps = teacher.process.T, key["source"], key["solver"], key["steps"]
    if source not in ("data", "rollout"):
        raise ValueError(f"source must be 'data' or 'rollout', got {source!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    reach = key["delta"] if source == "data" else steps
    if min(key["pairs"], key["batch_size"], reach) < 1 or reach > T:
        raise ValueError(f"pairs, batch size, delta and steps must be positive, delta and steps at most T={T}")
    if source == "data":
        if images is None or len(images) == 0 or images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError("source 'data' needs images: uint8 [N,C,H,W]")
        shape, steps = images.shape[1:], 1
        key["images"] = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:12]
    elif shape is None or solver == "posterior_mean":
        raise ValueError("source 'rollout' needs the image shape and a solver that ends on an image: ddim, heun, ancestral")
    key |= {"classes": classes(teacher.unet)} if classes(teacher.unet) else {}
    if source == "data" and "classes" in key:
        raise ValueError("a cache of a class-conditional teacher holds rollouts; give source 'rollout'")
    key |= {"pairs": -(-key["pairs"] // steps) * steps, "shard": max(1, SHARD // steps) * steps, "shape": list(shape)}
    probe, fits = torch.zeros(1, *shape, device=teacher.device), False
    with suppress(RuntimeError), balanced(teacher.unet, torch.zeros(1, dtype=torch.int64)):
        fits = teacher.eps(probe, torch.zeros(1, device=teacher.device)).shape == probe.shape
    if not fits:
        raise ValueError(f"the teacher's network does not take images of shape {tuple(shape)}")
    return {k: v for k, v in key.items() if k != ("steps" if source == "data" else "delta")}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock under which all files of a cache are written; so a temporary one seen here was left by a killed process."""
    with FileLock(folder / "manifest.lock"):
        for left in (*folder.glob("shard-*.tmp"), *folder.glob("manifest.json.*.tmp")):
            left.unlink()
        yield
