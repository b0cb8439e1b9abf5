"""`python -m mpp.plan`: what a run takes in memory and FLOPs, counted without weights and without a GPU."""

from typing import Any

from omegaconf import DictConfig

from mpp.config import build, check_config, command
from mpp.logs import record


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Count as configured.

    Returns:
        Each way to run that was counted, the one that is set first.

    Raises:
        ValueError: Bad settings, a cache that cannot be read, or a model whose shape is not known.
    """
    check_config(cfg)
    from mpp.models.streamed import check_count
    from mpp.training.choosing import is_open, settle
    from mpp.training.measuring import Run
    from mpp.training.plan_lines import TABLE, lines_of, table
    from mpp.training.planning import choices, costing, decoding

    plan, architecture, wanted = build(cfg.plan), build(cfg.model), build(cfg.memory)
    settings = Run(
        architecture=architecture,
        adapter=build(cfg.lora),
        memory=wanted,
        loss=build(cfg.loss),
        optimizer=build(cfg.optimizer),
        precision=plan.precision,
        accumulates=plan.accumulate > 1,
    )
    if settings.adapter is None:
        raise ValueError("lora=none: there is nothing to train; choose lora=lora")
    bucket = plan.bucket(architecture)
    counting = costing(settings)
    check_count(wanted.resident, counting.weights.count, architecture.pretrained)

    room = None if wanted.card is None else wanted.card * 2**30
    try:
        found = settle(wanted, counting, bucket, plan.batch_size, room)
    except RuntimeError as error:
        if bucket.conditioning is None:
            raise
        raise ValueError(
            f"data.cache_dir={plan.cache_dir} holds samples that {architecture.pretrained} cannot take "
            f"({str(error).splitlines()[0]}); choose the model that it was prepared for"
        ) from error
    samples = f"{plan.batch_size} sample{'s' * (plan.batch_size > 1)} of {bucket.name}"
    print(f"{architecture.pretrained}, {samples}, {found.choice.name}")
    if room is not None and is_open(wanted):
        print(f"chosen for {wanted.card:g} GiB" + ("" if found.fits else ", which nothing fits on this base"))
    print("\n".join(lines_of(found.choice, plan, decoding(architecture, settings.memory, bucket.shape))))
    ways = [found.choice]
    if plan.table:
        print(TABLE)
        print(table([])[0])
        for choice in choices(counting, bucket, plan.batch_size):
            print(table([choice])[1], flush=True)
            ways.append(choice)
    named = ("base", "activations", "resident", "teacher")
    rows = [{**{name: getattr(c.memory, name) for name in named}, **vars(c.costs)} for c in ways]
    record(bucket=bucket.name, plan=rows[0], table=rows[1:])
    return rows


main = command("plan", run)

if __name__ == "__main__":
    main()
