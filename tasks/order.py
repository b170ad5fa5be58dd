"""From a run to the order that its driver gets. Pure."""

import hashlib
import json
from pathlib import Path

import elastic
from checkpoint import Codec, LatestN, Parity, SavePolicy, Tier, check_tiers
from tasks.errors import SpecError
from tasks.runs import Run
from tasks.spec import CheckpointSpec, FaultSpec, RunSpec, TierSpec

_MIB = 1 << 20
# What the weights are a function of. Where they are trained, kept and broken makes no difference to them.
_DEFINING = ("job", "data", "training")


def to_order(run: Run) -> elastic.TrainOrder:
    """Write the order for a run."""
    spec = run.spec
    return elastic.TrainOrder(
        run=run.name,
        run_dir=run.directory,
        spec_digest=spec_digest(spec),
        job=elastic.JobOrder(
            path=spec.job.path,
            settings=spec.job.settings,
            source=spec.data.source,
            code_dir=Path(spec.job.code_dir).absolute(),
        ),
        training=elastic.TrainingOrder(
            num_steps=spec.training.steps,
            global_batch=spec.training.global_batch,
            virtual_ranks=spec.training.virtual_ranks,
            seed=spec.training.seed,
            determinism=spec.training.determinism,
            grad_clip=spec.training.grad_clip,
            compare_every=spec.recovery.compare_every,
            optimizer_copies=spec.training.optimizer_copies,
            parameter_copies=spec.training.parameter_copies,
            when_not_finite=spec.training.when_not_finite,
            bucket_mib=spec.training.bucket_mib,
        ),
        world=elastic.WorldPolicy(
            workers=spec.world.workers,
            min_workers=spec.world.min_workers,
            standbys_follow=spec.world.standbys == "auto",
            standbys=elastic.num_standbys(spec.world.workers)
            if spec.world.standbys == "auto"
            else spec.world.standbys,
            gather_s=spec.world.gather_s,
            wait_s=spec.world.wait_s,
            max_failures=spec.recovery.max_failures,
        ),
        cluster=elastic.ClusterOrder(
            address=spec.world.address,
            gpus_per_worker=spec.world.gpus_per_worker,
            threads_per_worker=spec.world.threads_per_worker,
        ),
        checkpoint=_checkpoint_order(spec.checkpoint, run.store_url, run.name),
        drill=tuple(_fault(fault) for fault in spec.drill.faults),
        lease_s=spec.recovery.lease_s,
    )


def spec_digest(spec: RunSpec) -> str:
    """Digest what defines the weights: equal digests mean equal weights, whatever happened on the way."""
    defining = {
        section: getattr(spec, section).model_dump(mode="json", exclude={"code_dir"}) for section in _DEFINING
    }
    return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()


def _checkpoint_order(spec: CheckpointSpec, url: str, run: str) -> elastic.CheckpointOrder:
    tiers = tuple(_tier(tier, run) for tier in spec.tiers)
    try:
        check_tiers((Tier(url, name="checkpoint.store"), *tiers))
    except ValueError as error:
        raise SpecError(f"checkpoint.tiers: {error}") from error
    return elastic.CheckpointOrder(
        store_url=url,
        every_steps=spec.every_steps,
        keep_latest=spec.keep_latest,
        keep_every=spec.keep_every,
        save=SavePolicy(
            codec=Codec[spec.codec.upper()],
            level=spec.level,
            when_full=spec.when_full,
            delta_chain=spec.delta_chain,
        ),
        arena_bytes=spec.arena_mib * _MIB,
        hold=spec.hold,
        parity=Parity(spec.parity_group, spec.parity_losses) if spec.parity_losses else None,
        tiers=tiers,
    )


def _tier(spec: TierSpec, run: str) -> Tier:
    return Tier(spec.url.replace("{run}", run), spec.every_steps, (LatestN(spec.keep_latest),), spec.name)


def _fault(spec: FaultSpec) -> elastic.Fault:
    return elastic.Fault(at_step=spec.at_step, kind=elastic.FaultKind(spec.kind), rank=spec.rank)
