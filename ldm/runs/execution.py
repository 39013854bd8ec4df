"""Execution of a run: stages in order, finished ones skipped, the rest done and recorded."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.config.counts import plural
from ldm.config.errors import UserError, out_of_memory
from ldm.config.schema import dump, plain
from ldm.config.version import __version__
from ldm.data.concatenation import Mixture
from ldm.data.dataset import asked
from ldm.data.file_names import printable
from ldm.data.filter import Filter, filter_samples
from ldm.data.masks import masks_say
from ldm.data.photos import left_out
from ldm.data.sources import affixes, both_parts, has_masks
from ldm.data.tags import TaggedSamples
from ldm.diffusion.rng import mix
from ldm.distributed.environment import calibrate
from ldm.distributed.launcher import about, record
from ldm.distributed.processes import Learners, Stopped, leave
from ldm.distributed.rank_checks import agree
from ldm.families.family import Context, Family, ModelConfig, Product
from ldm.formats import atomic
from ldm.models.gpu_form import round_products
from ldm.runs import extension, pretrained
from ldm.runs.changed_data import data_change, marks_of, remember
from ldm.runs.evaluation import measure
from ldm.runs.examples import varied
from ldm.runs.keys import DONE, IDENTITY, Finished, check_data, finished, hashes_of, identity, key_of, plain_json
from ldm.runs.launch_checks import by_heart, idle, missing, remarks, shares
from ldm.runs.prior_preservation import PRIOR, PriorPreservation, draw
from ldm.runs.run import Encode, Evaluate, Export, Run, place
from ldm.runs.run_folder import only_one, set_aside, sweep
from ldm.text.lengths import spread
from ldm.training.checkpoint import CARRIED, Former
from ldm.training.copies import Copies, begin
from ldm.training.log import Log
from ldm.training.loop import Handover, Trainer, too_large
from ldm.training.settings import Train

_DOING = {"train": "loading", "encode": "encoding", "evaluate": "evaluating", "export": "exporting"}
EXAMPLES, CANDIDATES = 6, 64  # captions that a model remembers, for whoever asks what it can draw; they are chosen from so many


class Execution:
    """One start of a run: it goes through the stages, skips what is done and does the rest."""

    def __init__(self, run: Run, out: Path, processes: Learners, extend: bool = False) -> None:
        self.run, self.out, self.processes, self.extend = run, out, processes, extend
        self.data, self.val = both_parts(run.data)
        self.log = Log(out, tracker=run.tracker, console=self.processes.main, write=self.processes.main)
        self.done: dict[str, Finished] = {}
        self.elsewhere = pretrained.find(run, self.log.note)
        if run.prior_preservation is not None:
            self.data = self._with_prior(run.prior_preservation)
        self.copies = Copies(out, run.mirror, self.log.note) if run.mirror and processes.main else None
        self.made: dict[str, Product] = {}  # the parts from elsewhere, as stages read them

    def _with_prior(self, prior: PriorPreservation) -> Mixture:
        folder = self.out / pretrained.FOLDER / PRIOR
        if prior.prompts and self.processes.main:
            draw(prior, self.run.init, folder, str(self.processes.device), self.log.note)
        self.processes.wait()
        return prior.mixed(self.data, folder)

    def start(self) -> None:
        """Do every stage that is not done.

        Raises:
            UserError: on anything the user can mend.
            Stopped: when a signal asked for it and the state was saved.
        """
        from ldm.runs.report import report

        check_data(self.run, self.data, self.val)
        described = self.data.describe()
        for line in data_lines(described):
            self.log.note(line)
        if has_masks(self.run.data):
            black_counts = any(model.learns_masked_out for model in self.run.models.values())
            if said := masks_say(self.data, described, black_counts):
                self.log.note(said)
        if self.processes.main:
            marks = marks_of(self.data)
            if change := data_change(self.out, marks):
                self.log.note(f"data: changed since the last start: {change}")
            remember(self.out, marks)
        for line in (*idle(self.run), *by_heart(self.run, len(self.data))):
            self.log.note(f"warning: {line}")
        for line in remarks(self.run):
            self.log.note(line)
        if self.elsewhere:
            pretrained.check(self.run, self.elsewhere)
            for line in dict.fromkeys(pretrained.oversized(self.run, self.elsewhere)):
                self.log.note(f"warning: {line}")
            if self.processes.main:
                pretrained.make(self.run, self.elsewhere, self.out, write=True)
            self.processes.wait()
            self.made = pretrained.make(self.run, self.elsewhere, self.out, write=False)
            for name, part in self.elsewhere.items():
                self.log.note(f"{name}: from {part.path} ({part.hash[:12]})")
        gpu = self.processes.device.type == "cuda"
        if self.processes.main and (gpu or sys.stderr.isatty()):  # counting takes seconds: for runs that are long, or watched
            from ldm.runs.plan import expected

            self.log.expected = expected(self.run, self.processes.world, torch.cuda.get_device_name() if gpu else "")
        try:
            for name in self.run.stages:
                self._stage(name)
        finally:
            if self.copies is not None:
                self.copies.close()
            if self.processes.main and self.done:
                self._write_metrics()
                path = report(self.out)
                self.log.note(f"report: {path}")
                if (self.out / "model" / atomic.MANIFEST).is_file():
                    self.log.note(f"model: try {self._usage(self.story()['prompt'], str(self.out))}")
            self.log.close()

    def _stage(self, name: str) -> None:
        folder = self.out / "stages" / name
        hashes = hashes_of(self.run, name, self.done, self.elsewhere)
        wanted = identity(self.run, name, self.data, self.val, hashes)
        key = key_of(wanted)
        if self.run.mirror:
            if self.copies is not None:
                self.copies.finished(name, key, self._aside)
            self.processes.wait()
        have = self._finished(folder)
        complete = have is not None and have.key == key
        if complete and not (isinstance(self.run.stages[name], Export) and not self._exported(have)):
            assert have is not None
            self.done[name] = have
            self.log.note(f"{name}: done already, nothing it depends on has changed")
            self._judge(name, have.result)
            return
        self.processes.wait()
        if self.processes.main:
            self._make_room(name, folder, wanted, have)
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_json(folder / IDENTITY, wanted | {"key": key})
            if self.copies is not None:
                stage = self.run.stages[name]
                self.copies.newest(name, key, stage.keep if isinstance(stage, Train) else 1)
        self.processes.wait()
        started = time.monotonic()
        result, images = self._do(name, folder, key, self.products(name))
        if self.processes.main:
            product, carried = (atomic.folder_hash(folder / part) if (folder / part).is_dir() else "" for part in ("model", CARRIED))
            spent = time.monotonic() - started + self._earlier_seconds(folder)
            values = {
                "stage": name,
                "kind": self.run.stages[name].kind,
                "key": key,
                "identity": plain_json(wanted),
                "inputs": hashes,
                "product": product,
                "result": result,
                "seconds": round(spent, 2),
                "images": images,
                "carried": carried,
                "version": __version__,
                "history": plain(extension.history(folder)),
            }
            atomic.write_json(folder / DONE, values)
            shutil.rmtree(folder / "state", ignore_errors=True)
            if self.copies is not None:
                self.copies.stage(folder)
        self.processes.wait()
        have = self._finished(folder)
        assert have is not None, f"{folder} was just finished"
        self.done[name] = have
        self.log.note(f"{name}: finished in {have.seconds:.0f} s{_headline(result)}")
        self._judge(name, have.result)

    def _finished(self, folder: Path) -> Finished | None:
        """The finished stage in a folder, read and hashed by the first process for all."""
        return self.processes.gather([finished(folder) if self.processes.main else None])[0]  # type: ignore[no-any-return]

    def _aside(self, folder: Path) -> None:
        self.log.note(f"{folder.name}: what was here is kept in {set_aside(folder)}")

    def _make_room(self, name: str, folder: Path, wanted: Mapping[str, Any], have: Finished | None) -> None:
        """Put a stage of another key aside, saying what differs, or go on from its state; an interrupted one of this key stays."""
        doing = extension.decide(folder, have, wanted, self.extend)
        if doing.odd:
            self.log.note(f"{name}: {doing.odd}; its checkpoints say themselves whose they are")
        if doing.goes_on:
            return
        kept = set_aside(folder) if folder.exists() else None
        if (found := doing.extends) is not None:
            found = replace(found, folder=kept.name) if kept is not None and found.folder == folder.name else found
            extension.begin(folder, found, wanted)
            self.log.note(f"{name}: {doing.why}; the former result is kept in {folder.with_name(found.folder)}")
            self.log.record({"extended": found.images, "stage": name, "changed": found.changed})
        elif kept is not None:
            self.log.note(f"{name}: runs anew, since {doing.why.removeprefix('changed: ')}; the former result is kept in {kept}")

    def _earlier_seconds(self, folder: Path) -> float:
        """Time that interrupted starts of this stage had already spent, as their log tells."""
        return self.log.seconds_before(folder.name)

    def _exported(self, have: Finished | None) -> bool:
        return have is not None and (self.out / "model" / atomic.MANIFEST).is_file()

    def products(self, name: str) -> dict[str, Product]:
        """What a stage reads, by role: of earlier stages, and from elsewhere."""
        every, found = self.run.everything(), {}
        for role, read in self.run.reads(name).items():
            stage = self.run.stages.get(read.stage)
            config = every.get(stage.model if isinstance(stage, Train) else read.model)
            made = (
                Product(self.out / "stages" / read.stage / "model", self.done[read.stage].product) if read.stage else self.made[read.model]
            )
            found[role] = replace(made, config=config)
        return found

    def _do(self, name: str, folder: Path, key: str, products: Mapping[str, Product]) -> tuple[dict[str, Any], int]:
        stage = self.run.stages[name]
        self.processes.begin(name, _DOING[stage.kind])
        round_products(to_tf32=False)  # but where a training stage lets it
        if isinstance(stage, Train):
            return self._train(name, stage, folder, key, products), stage.images
        if isinstance(stage, Encode):
            return self._encode(name, stage, folder, products)
        if isinstance(stage, Evaluate):
            return self._evaluate(name, stage, folder, products), 0
        return (self._export(name, products) if self.processes.main else {}), 0

    def _seed(self, name: str) -> int:
        return mix(self.run.seed, name) % 2**63

    def _train(self, name: str, stage: Train, folder: Path, key: str, products: Mapping[str, Product]) -> dict[str, Any]:
        family, context, data = self.begun(name, stage, products)
        before = self.run.carried_from(name)
        trainer = Trainer(
            stage,
            family,
            context,
            data=data,
            folder=folder,
            key=key,
            workers=self.run.workers,
            processes=self.processes,
            log=self.log,
            handover=Handover(
                Product(self.out / "stages" / before / CARRIED, self.done[before].carried) if before else None,
                stage.keep_state or self.run.carried_on(name),
                self._former(folder),
                self.copies,
            ),
        )
        try:
            return trainer.run()
        except Exception as error:
            if out_of_memory(error):
                raise too_large(trainer, error) from None
            raise

    def begun(self, name: str, stage: Train, products: Mapping[str, Product]) -> tuple[Family, Context, Any]:
        """The family of a training stage before its first step, what it was built from, and what it is trained on."""
        from ldm.data.cached import CachedLatents

        config = self._config(name, stage)
        seen = asked(filter_samples(self.data, stage.filter, f"stages.{name}.filter"), config.views())
        context = Context(
            data=seen,
            val=asked(self.val, config.views()),
            held_out=self._held_out(name, stage),
            own=self._own(name, stage),
            resolution=stage.resolution,
            seed=self._seed(name),
            total_images=stage.images,
            products={k: v for k, v in products.items() if k not in ("init", "latents")},
            init=products.get("init"),
            device=self.processes.device,
        )
        torch.manual_seed(context.seed)
        family = config.build(context)
        data: Any = seen
        if stage.latents:
            cache = stage.cache
            data = CachedLatents(cache or products["latents"].folder).with_views(config.views())
            if cache:
                pretrained.check_cache(data, self.run, stage, products)
        if stage.tags is not None:
            data = TaggedSamples(data, stage.tags, affixes(self.run.data))
        return family, context, data

    def _filter(self, stage: Train) -> Filter:
        """Of what a stage trains on: where it reads cached latents, the encode stage's."""
        encode = self.run.stages.get(stage.latents)
        return encode.filter if isinstance(encode, Encode) else stage.filter

    def _held_out(self, name: str, stage: Train) -> Any:
        """The held-out samples that training would see; where none passes its filter all of them, which is told."""
        held_out: Any = asked(self.val, self.run.models[stage.model].views())
        if not len(held_out):
            return held_out
        try:
            held_out = filter_samples(held_out, self._filter(stage), f"stages.{name}.filter")
        except UserError:
            self.log.note(f"{name}: no held-out sample passes the filter; loss is compared with all of them")
        return held_out if stage.tags is None else TaggedSamples(held_out, stage.tags, affixes(self.run.data))

    def _own(self, name: str, stage: Train) -> int:
        """How many samples are the run's own, where others preserve a prior."""
        if not isinstance(self.data, Mixture) or stage.cache:
            return 0
        return len(filter_samples(self.data.parts[0], self._filter(stage), f"stages.{name}.filter"))

    def _former(self, folder: Path) -> Former | None:
        """The stage of other settings that a stage goes on from."""
        if not (changes := extension.history(folder)):
            return None
        last = changes[-1]
        same = not any(line.startswith("settings.optim.kind:") for line in last.changed)
        return Former(folder.with_name(last.folder), last.images, same)

    def _config(self, name: str, stage: Train) -> ModelConfig:
        """The configuration of the model that a stage trains; where it continues a base model, that says what it does not."""
        return pretrained.continued(self.run, name, stage, self.elsewhere)

    def _encode(self, name: str, stage: Encode, folder: Path, products: Mapping[str, Product]) -> tuple[dict[str, Any], int]:
        from ldm.data.cache import CacheOptions, seal, write_cache

        views = self.run.views_kept(name)
        seen = asked(filter_samples(self.data, stage.filter, f"stages.{name}.filter"), views)
        count = min(stage.images or len(seen), len(seen))
        device = self.processes.device
        codec = self.run.everything()[stage.model].encoder(products["model"].folder, device)
        if stage.codes and not codec.codes:
            raise UserError(f"stages.{name}.codes: {stage.model} has no codebook; use a VQ autoencoder")
        with self.log.stage(name, count, 0) as log:
            write_cache(
                folder / "model",
                seen,
                lambda image: (codec.encode_codes(image.to(device)), None) if stage.codes else codec.moments(image.to(device)),
                CacheOptions(
                    autoencoder=codec.hash,
                    normalisation=codec.statistics.to_dict(),
                    resolution=stage.resolution,
                    images=count,
                    seed=self._seed(name),
                    flip=stage.flip,
                    buckets=stage.buckets,
                    views=views,
                    codes=codec.codes if stage.codes else 0,
                ),
                batch=stage.batch,
                workers=self.run.workers,
                rank=self.processes.rank,
                world=self.processes.world,
                on_images=log.advance,
            )
        self.processes.wait()
        if self.processes.main and self.processes.world > 1:
            seal(folder / "model")
        self.processes.wait()
        return {"images": count}, count

    def story(self) -> dict[str, Any]:
        stages = {
            name: f"{plural(stage.images, 'image')} at {stage.resolution} px" if isinstance(stage, Train) else stage.kind
            for name, stage in self.run.stages.items()
            if name in self.done
        }
        caption = next(iter(self.val.captions([0], [0], 0)), "a picture") if len(self.val) else "a picture"
        described = self.data.describe()
        chosen = list(spread(len(self.val), CANDIDATES))
        captions = self.val.captions(chosen, chosen, 0) if chosen else []
        return {
            "name": self.run.name,
            "data": f"{described.get('kind', 'data')}, {plural(len(self.data), 'image')}",
            "prompt": self._example_of(caption).replace('"', ""),
            "examples": varied([self._example_of(text)[:200] for text in captions], EXAMPLES),
            "use": self._usage("PROMPT", "MODEL"),
            "stages": stages,
        }

    @property
    def _last(self) -> ModelConfig:
        """The model that was trained last."""
        models = [self.run.models[stage.model] for stage in self.run.stages.values() if isinstance(stage, Train)]
        return models[-1] if models else ModelConfig()

    def _example_of(self, caption: str) -> str:
        """A prompt that shows what was learned last."""
        return self._last.example_of(caption)

    def _usage(self, prompt: str, model: str) -> str:
        return self._last.usage(prompt, model)

    def _evaluate(self, name: str, stage: Evaluate, folder: Path, products: Mapping[str, Product]) -> dict[str, Any]:
        of, main = self._measured(name), self.processes.main
        scratch = folder / "assembled"
        config, opened = self.run.models[of.model], []
        if main:
            shutil.rmtree(scratch, ignore_errors=True)  # of a start that was killed
        for turn in (main, not main):  # the first process assembles the model, the others open it
            if turn:
                opened.append(config.measured(products, scratch, self.story(), self.processes.device))
            self.processes.wait()
        if main:
            shutil.rmtree(scratch, ignore_errors=True)
        with self.log.stage(name, 0, 0) as log:
            return measure(
                opened[0],
                stage.metrics,
                data=asked(self.val, self.run.models[of.model].views()),
                resolution=of.resolution,
                seed=self.run.seed,
                pictures=folder / "samples" if main else None,
                progress=log.progress,
                train=self.data,
                team=self.processes if self.processes.world > 1 else None,
            )

    def _export(self, name: str, products: Mapping[str, Product]) -> dict[str, Any]:
        model = self.run.models[self._measured(name).model]
        model.assemble(products, self.out / "model", self.story())
        for part in model.beside:
            if (learned := products["model"].folder / part).is_dir():
                atomic.commit(self.out / part, partial(shutil.copytree, learned, dirs_exist_ok=True))
        return {"model": "model", "hash": atomic.folder_hash(self.out / "model")}

    def _measured(self, name: str) -> Train:
        """The training stage that an evaluate or export stage is about."""
        stage = self.run.stages[self.run.measured(name)]
        assert isinstance(stage, Train)
        return stage

    def _judge(self, name: str, result: Mapping[str, Any]) -> None:
        """Compare a measurement with what its stage requires.

        Raises:
            UserError: when a required value is missed and the stage says stop.
        """
        stage = self.run.stages[name]
        if not isinstance(stage, Evaluate):
            return
        for path, least in stage.require.items():
            value: Any = result
            for word in path.split("."):
                value = value.get(word) if isinstance(value, Mapping) else None
            if not isinstance(value, int | float):
                raise UserError(f"stages.{name}.require: {path!r} names no value of this stage's metrics")
            if value >= least:
                self.log.note(f"{name}: {path} {value:.3f} meets the required {least:g}")
                continue
            text = f"{name}: {path} is {value:.3f}, below the required {least:g}"
            if stage.on_miss == "stop":
                raise UserError(
                    f"{text}. Train {stage.of} longer (stages.{stage.of}.images), or accept it with"
                    f" stages.{name}.on_miss=warn; everything done so far is kept"
                )
            self.log.note(f"warning: {text}")

    def _write_metrics(self) -> None:
        metrics = {name: done.result for name, done in self.done.items() if isinstance(self.run.stages[name], Evaluate)}
        trained = {name: done.result for name, done in self.done.items() if isinstance(self.run.stages[name], Train) and done.result}
        if metrics or trained:
            atomic.write_json(self.out / "metrics.json", {"version": __version__, "evaluations": metrics, "training": trained})


# How the console names what data sets tell of themselves.
SPOKEN = {"images_in_both_parts": "with the held-out ones", "of_its_kind": "prior pictures", "captions_from": "captions from"}


def data_lines(described: Mapping[str, Any]) -> Iterator[str]:
    """What a data set says of itself, in a line, and its rejected files in further ones."""
    plain = {k: v for k, v in described.items() if isinstance(v, int | str) and not isinstance(v, bool) and k != "fingerprint"}
    named = {SPOKEN.get(name, name): value for name, value in plain.items()}
    yield "data: " + ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in named.items())
    told = left_out([described])
    if rejected := told["rejected"]:
        yield "left out: " + ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
    yield from (f"  {line}" for line in told["rejected_files"])
    yield from (
        f"warning: {name} is damaged: {printable('; '.join(places[:3]))}" for name, places in told.get("damaged_shards", {}).items()
    )
    yield from (f"warning: {line}" for line in told["notes"])


def _headline(result: Mapping[str, Any]) -> str:
    """The plain numbers of a result, for one line."""
    numbers = {name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    shown = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}" for name, value in numbers.items()]
    return f"; {', '.join(shown)}" if shown else ""


def execute(run: Run, out: Path, file: Path | None = None, extend: bool = False) -> int:
    """Do a placed run.

    Args:
        file: where its settings come from.
        extend: go on from the state of stages that had other settings, instead of training them anew.
    """
    return carry_out(run, out, str(file or "Run"), extend)


def start(run: Run, extend: bool = False) -> Path:
    """Do a run from Python; returns its folder.

    Args:
        extend: as `execute`'s.

    Raises:
        UserError: on anything the caller can mend.
    """
    placed, out = place(run, None)
    execute(placed, out, extend=extend)
    return out


def carry_out(run: Run, out: Path, file: str = "the configuration", extend: bool = False) -> int:
    """Do a run in its folder; returns the exit code.

    Args:
        file: where its settings come from, for the start's account.
        extend: as `execute`'s.
    """
    threads = calibrate()
    processes = Learners()
    try:
        _carry_out(run, out, processes, threads, file, extend)
        processes.close()
    except KeyboardInterrupt:
        if processes.watchdog is None:
            raise
        leave(130)
    except Exception as error:
        if processes.watchdog is None:
            raise
        leave(processes.ended(error))
    return 0


def _carry_out(run: Run, out: Path, processes: Learners, threads: str, file: str, extend: bool = False) -> None:
    work = shares(run, processes.launch)
    if lacking := list(missing(run, processes.device)):
        raise UserError("\n".join(lacking))
    with only_one(out) if processes.main else nullcontext():
        if processes.main:
            sweep(out)
            (out / "config.yaml").write_text(dump(run))
            if run.mirror:
                begin(out, run.mirror)
        if processes.watchdog is not None:
            processes.watchdog.folder = out
        execution = Execution(run, out, processes, extend)
        execution.log.note(f"ldm {__version__}, torch {torch.__version__}, {processes.world} x {processes.device}, {threads}")
        for line in about(processes.launch, processes.device.type, work, file):
            execution.log.note(line)
        execution.log.record(record(processes.launch, processes.device.type, work))
        facts = {
            "config": plain(run),
            "out": str(out),
            "extend": extend,
            "data": f"{plural(len(execution.data), 'sample')}, fingerprint {execution.data.fingerprint()[:16]}",
            "val": f"{plural(len(execution.val), 'sample')}, fingerprint {execution.val.fingerprint()[:16]}",
        }
        agree(processes, facts, out)
        try:
            execution.start()
        except Stopped:
            execution.log.note("stopped, everything is saved; the same command goes on from here")
