"""The trainer: builds a run from its config, and repeats one step until it is done or told to stop."""

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from fasttrain.building import build_network, build_objective
from fasttrain.checkpoint import FORMAT, Checkpoints, Manifest, Plan, Progress, check_fits, lengths_of
from fasttrain.choices import check_kernels, choose_attention, describe_kernels, make_deterministic
from fasttrain.config import RunConfig
from fasttrain.damage_report import DamageReport
from fasttrain.dataset import open_data
from fasttrain.diffusion.uncertainty import decay_groups
from fasttrain.engine.activity import Activity
from fasttrain.engine.agreement import Agreement, Decision
from fasttrain.engine.checksum import differing
from fasttrain.engine.deepspeed import accumulates_in_bf16, build_engine, gradient_norm, offloads, time_gathers
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import TrainingState
from fasttrain.engine.optimizer import Clock, ema_name
from fasttrain.engine.updates import choose_update
from fasttrain.engine.watchdog import Watchdog
from fasttrain.errors import CorruptedError
from fasttrain.lengths import lengths, told_of_kept
from fasttrain.lock import WAIT_SECONDS, locked
from fasttrain.metrics import Meters, Reporter, Stopwatch, peak_flops
from fasttrain.models.flops import TRAINING
from fasttrain.pareto_weights import ParetoWeights
from fasttrain.preview import Preview
from fasttrain.profiling import Profiler
from fasttrain.prompts import write_prompts
from fasttrain.rescue import Rescue
from fasttrain.run import check_identity, check_same, identity, resolve, write_folder
from fasttrain.saving import Saver
from fasttrain.skipping import Skips, with_its_gradient
from fasttrain.spikes import Spikes, recent_losses
from fasttrain.stopping import Stop
from fasttrain.stragglers import Pace
from fasttrain.transfer import Transfer, told_at_resume, trained_shapes
from fasttrain.visible import decoder

# Launchers kill half a minute after they asked for a stop.
SECONDS_AT_A_STOP = 20.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Trainer:
    """A run in progress. `config` is the run's, `processes` this process among its ranks; `fit` does everything."""

    def __init__(self, config: RunConfig, processes: Processes, activity: Activity | None = None):
        data = open_data(config, activity.renew if activity else lambda: None)
        self.data, self.index, self.damage = data, data.index, data.shards.damage
        begun = processes.from_main(lengths_of(config.run_dir) if processes.is_main else None)
        asked, self.config = config, resolve(config, self.index, begun)
        config = self.config
        self._kept = told_of_kept(asked, config)
        self.processes = processes
        self.activity = activity or Activity()
        self.micro_batch = config.training.micro_batch_of(processes.world_size)
        self.accumulation_steps = config.training.accumulation_steps(processes.world_size)
        self.dtype = DTYPES[config.training.precision]
        self.seed = torch.tensor(config.seed, device=processes.device)
        self.identity = identity(config, self.index)
        check_same(config, self.identity, processes)
        if config.training.deterministic:
            make_deterministic()
        check_kernels(config.kernels, self.seed)
        self.objective = build_objective(config, self.seed, data.empty)
        self.pareto = ParetoWeights(config, data, processes, self.objective, self.micro_batch, self.dtype)
        self.loader = data.training_loader(config, self.seed)
        held_out = data.held_out_loader(config, self.seed) if config.log.held_out_every else None
        decode = decoder(self.index, config.data, processes.device) if config.sampling.every else None
        self.preview = Preview(config, self.index, processes, held_out, decode, self.dtype, self.activity.renew)
        how = {"deterministic": config.training.deterministic, "compiled": config.training.compile}
        attention, self._attention = choose_attention(config.attention, config.model, self.micro_batch, self.dtype, processes, **how)
        self.network = build_network(config, attention)
        self.transfer = Transfer.of_new_run(config, self.index, trained_shapes(self.network), processes)
        offloaded = offloads(config.deepspeed_settings())
        update = choose_update(config.optimizer.implementation, config.kernels.of("adamw_ema"), processes.device, offloaded)
        self.optimizer = config.optimizer.build(decay_groups(self.network), update)
        self.engine = build_engine(
            self.network,
            self.optimizer,
            config.deepspeed_settings(),
            micro_batch=self.micro_batch,
            accumulation_steps=self.accumulation_steps,
            precision=config.training.precision,
            clip=config.training.clip,
            whole=self.network.block_type if config.training.compile else None,
        )
        self.state = TrainingState(self.engine, config.zero_stage, processes)
        self.checkpoints = Checkpoints(config.run_dir, processes)
        self.saver = Saver(config.run_dir, processes, config.checkpoint, config.collective_seconds)
        self.rescue = Rescue(self.saver, self.state, self.activity, self._plan)
        self.meters = Meters(processes, config.log.timestep_ranges, config.diffusion.schedule.num_timesteps, self.accumulation_steps)
        self.pace = Pace(processes, time_gathers(self.engine))
        self.spikes = Spikes(config.log.spike)
        self.progress = Progress(0, 0, 0)
        self.saved_step: int | None = None
        self._reported_step = 0

    def fit(self, stop: Stop | None = None, watchdog: Watchdog | None = None, profile_steps: int = 0) -> bool:
        """Trains to the last step, from the newest good checkpoint on. True when done; False when stopped early by `stop`, saved."""
        config, stop = self.config, stop or Stop()
        with ExitStack() as stack:
            stack.callback(self.loader.close)
            stack.callback(self.pareto.close)
            stack.callback(self.data.close)  # first, so that no thread waits on for a store
            stack.callback(self.saver.close)
            if watchdog is not None:
                watchdog.on_fault(self.rescue)
                stack.enter_context(watchdog.explaining())
            self.activity.begin("resuming", 0)
            stack.enter_context(locked(config.run_dir, self.processes, min(WAIT_SECONDS, config.training.timeout_seconds / 2)))
            found = self.find_checkpoint()
            write_folder(config, self.index, self.processes)
            if self.data.text is not None and self.processes.is_main:
                write_prompts(config.run_dir, self.data.text)
            reporter = stack.enter_context(Reporter(config.run_dir, self.processes, config.training.steps, config.log.tensorboard))
            profiler = stack.enter_context(Profiler(config.run_dir, self.processes, profile_steps))
            reporter.say(self._means())
            if text := self.data.describe_text():
                reporter.say(f"text: {text}")
            self.skips = stack.enter_context(closing(Skips(config, self.processes)))
            self.damaged = stack.enter_context(closing(DamageReport(config.run_dir, self.processes, self.damage)))
            self.resume(reporter, found)
            self._forget_later(reporter)
            self.damaged.tell(reporter.say, self.progress.step, 0)
            if config.training.compile:
                self.engine.compile()
            self.batches = self.loader.batches(self.progress.position, self.micro_batch, self.processes.rank, self.processes.world_size)
            watch, agreement, decision = Stopwatch(), Agreement(self.processes), Decision()
            stop.only_note()
            while self.progress.step < config.training.steps and not decision.stop:
                taken = self.train_step()
                profiler.step()
                reporter.advance(self.progress.step)
                decision = agreement.reach(stop.number, self.saver.failed is not None)
                if decision.save_failed:
                    self.saver.finish()
                self._after_step(reporter, watch, bool(decision.stop), taken)
            agreement.close()
            stop.number = decision.stop
            return not decision.stop

    def train_step(self) -> bool:
        """One optimizer step: `global_batch` images forward and backward in micro-batches, then one update of weights and averages.

        Returns whether it was taken: a loss or gradient that is not finite on any rank leaves everything as it was, on all ranks.
        """
        training, step = self.config.training, self.progress.step + 1
        next_position = self.progress.position + training.global_batch
        rate = self.config.optimizer.rate(step, training.steps)
        self.optimizer.begin(Clock(self.progress.updates + 1, next_position, training.global_batch), rate)
        self.pareto.before_step(step, self.progress.position, self.network, self.activity)
        for remaining in reversed(range(self.accumulation_steps)):
            self._begin("data", step)
            batch = next(self.batches)
            self._begin("forward", step)
            loss = self.objective(self.engine, batch.clean, batch.cond, batch.position, dtype=self.dtype)
            self._begin("backward", step)
            self.engine.backward(with_its_gradient(loss.loss))
            if not remaining:
                self.before_update(step)
            self._begin("update", step)
            self.engine.step()
            self.meters.add(loss.weighted.mean(), loss.by_range)
        self.pace.end_step()
        taken = bool(self.engine.was_step_applied())
        self.progress = Progress(step, next_position, self.progress.updates + taken)
        return taken

    def before_update(self, step: int) -> None:
        """Compares what the step was computed with over the ranks, every so often: ZeRO 1 and 2 write it anew in the update."""
        if self.config.training.checksum_every and step % self.config.training.checksum_every == 0:
            self._check_replicas(step)

    def _check_replicas(self, step: int) -> None:
        self.activity.begin("comparing", step)  # an activity from which nothing is rescued
        if told := differing(self.processes, self.state.replicated()):
            raise CorruptedError(f"at step {step} {told}; nothing is saved: start the same command again, from the checkpoint before")

    def _begin(self, what: str, step: int) -> None:
        self.activity.begin(what, step)
        self.pace.mark(what)

    def find_checkpoint(self) -> tuple[Path, Manifest, list[str]] | None:
        """The newest checkpoint that verifies, and what was passed over. Refuses another run's before anything is written over it."""
        found = self.checkpoints.newest()
        if found is not None:
            folder, manifest, _ = found
            check_identity(self.identity, manifest.identity, folder)
            check_fits(manifest, self.state.shapes, self.state.keys, folder)
        return found

    def resume(self, reporter: Reporter, found: tuple[Path, Manifest, list[str]] | None) -> None:
        """Continues from a checkpoint of any world size and ZeRO stage; starts anew where there is none."""
        if found is None:
            if self.transfer is not None:
                self.transfer.begin(self.state, self.config.run_dir, self.processes, reporter.say)
            reporter.say(f"starting in {self.config.run_dir}")
            return
        folder, manifest, passed_over = found
        for damaged in passed_over:
            reporter.say(f"passed over a damaged checkpoint: {damaged}")
        self.checkpoints.load(self.state, folder, manifest)
        self.pareto.restore(manifest.timestep_weights)
        self.saver.continue_from(folder)
        self.progress = manifest.progress
        self.saved_step = self._reported_step = self.progress.step
        reporter.say(f"continuing from {folder.name} in {self.config.run_dir}")
        for told in filter(None, (told_at_resume(self.config), *self._kept)):
            reporter.say(told)

    def save(self) -> None:
        """Begins to save this step, once: training goes on when its state is copied."""
        if self.saved_step != self.progress.step:
            if self.config.training.checksum_every:
                self._check_replicas(self.progress.step)
            self.activity.begin("saving", self.progress.step)
            self.saver.begin(self.state, self._plan())
            self.saved_step = self.progress.step

    def _plan(self) -> Plan:
        """What a checkpoint of this moment holds."""
        return Plan(
            format=FORMAT,
            progress=self.progress,
            identity=self.identity,
            shapes=self.state.shapes,
            states=self.state.keys,
            world_size=self.processes.world_size,
            zero_stage=self.config.zero_stage,
            timestep_weights=self.pareto.values,
            lengths={key: length for key, length in lengths(self.config).items() if length is not None},
        )

    def _means(self) -> str:
        """What this run computes with, told once at its start."""
        config, device = self.config, self.processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
        summed = accumulates_in_bf16(config.zero_stage, config.training.precision, self.accumulation_steps)
        compiled = "; each block compiled" if config.training.compile else ""
        same = "; deterministic: the same bits each time on the same device" if config.training.deterministic else ""
        rounding = f"; gradients of {self.accumulation_steps} micro-batches summed in bf16 (in fp32 from ZeRO 2 on)" if summed else ""
        return (
            f"{self.processes.world_size} x {name}, {config.training.precision}, ZeRO {config.zero_stage}; "
            f"kernels: {describe_kernels(config.kernels)}; attention: {self._attention}; "
            f"optimizer: {self.optimizer.update.describe()}{rounding}{compiled}{same}"
        )

    def _forget_later(self, reporter: Reporter) -> None:
        """Takes back what was written of steps that are taken again now, and looks at the losses before them."""
        self.skips.resume(self.progress.step)
        reporter.forget_after(self.progress.step)
        if self.processes.is_main:  # which alone tells of spikes
            before = recent_losses(self.config.run_dir / "metrics.jsonl", self.progress.step)
            self.spikes = Spikes(self.config.log.spike, before)

    def _after_step(self, reporter: Reporter, watch: Stopwatch, stopped: bool, taken: bool) -> None:
        step, config = self.progress.step, self.config
        finished = step == config.training.steps
        last = stopped or finished
        if taken:
            self.skips.taken()
        else:
            first = self.progress.position - config.training.global_batch
            reporter.say(self.skips.note(step, first, gradient_norm(self.engine), self.optimizer.learning_rate, self.meters))
        if last or step % config.log.every == 0:
            self.activity.begin("reporting", step)
            record = self._record(watch)
            record["samples_replaced"] = self.damaged.tell(reporter.say, step, self.loader.replaced)
            reporter.report(record)
            self._tell_spikes(reporter, record["losses"])
        with watch.pause():
            if last or step % config.checkpoint.every == 0:
                self.save()
            if last:
                self.activity.begin("finishing", step)
                self.saver.finish(SECONDS_AT_A_STOP if stopped else None)
            for told in self.saver.poll():
                reporter.say(told)
            # Who asks for a stop does not wait for pictures: launchers kill after half a minute.
            held_out = config.log.held_out_every and (finished or step % config.log.held_out_every == 0)
            grid = config.sampling.every and (finished or step % config.sampling.every == 0)
            if (held_out or grid) and not stopped:
                self._look(reporter, bool(held_out), bool(grid))

    def _tell_spikes(self, reporter: Reporter, losses: list[float]) -> None:
        """Flags steps of the interval whose loss stands out, each with its first position, so that it can be looked at again."""
        step, batch = self.progress.step, self.config.training.global_batch
        for spike in self.spikes.judge(step - len(losses) + 1, losses):
            position = self.progress.position - (step - spike.step + 1) * batch
            reporter.say(spike.told(position, batch, self.config.run_dir))
            reporter.write({"step": spike.step, "position": position, "spike": {"loss": spike.loss, "deviations": spike.deviations}})

    def _look(self, reporter: Reporter, held_out: bool, grid: bool) -> None:
        self.activity.begin("looking", self.progress.step)
        self.preview.load(self.state.full(ema_name(0)))
        if held_out:
            losses = self.preview.held_out_loss(self.micro_batch, self.objective.weighting)
            reporter.say(f"held-out loss {losses['held_out_loss']:.4f}, unweighted {losses['held_out_mse']:.4f}")
            reporter.write({"step": self.progress.step, "position": self.progress.position, **losses})
        if grid:
            reporter.say(self._draw(self.config.run_dir / "samples" / f"step-{self.progress.step:08d}.png"))

    def _draw(self, path: Path) -> str:
        """Draws samples, and says what became of them: a picture that finds no room must not end the run."""
        try:
            drawn = self.preview.draw(path)
        except OSError as error:
            return f"no samples drawn: {path} cannot be written: {error.strerror or error}; training goes on"
        return f"samples drawn to {path}" if drawn else "no samples drawn: they are latents; data.vae must say what decodes them"

    def _record(self, watch: Stopwatch) -> dict[str, Any]:
        """What the run tells at a log interval: where our code waits for the device (so does the guard of fp32 without ZeRO)."""
        sums = self.meters.reduce()
        steps = self.progress.step - self._reported_step
        self._reported_step = self.progress.step
        seconds = watch.lap()
        images_per_second = steps * self.config.training.global_batch / seconds
        peak = peak_flops(self.processes.device)
        flops = images_per_second * self.config.model.flops_per_image() * TRAINING / self.processes.world_size
        return {
            **dataclasses.asdict(self.progress),
            **sums,
            **self.pareto.record(),
            **self.pace.report(seconds / max(steps, 1)),
            "grad_norm": gradient_norm(self.engine),
            "learning_rate": self.optimizer.learning_rate,
            "skipped": self.progress.step - self.progress.updates,
            "images_per_second": images_per_second,
            "mfu": flops / peak if peak else None,
            "seconds_left": (self.config.training.steps - self.progress.step) * seconds / max(steps, 1),
        }
