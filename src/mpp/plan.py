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
    from mpp.training.measuring import Run
    from mpp.training.planning import Choice, choices, costing, decoding, lines_of, table

    plan, architecture = build(cfg.plan), build(cfg.model)
    settings = Run(
        architecture=architecture,
        adapter=build(cfg.lora),
        memory=build(cfg.memory),
        loss=build(cfg.loss),
        optimizer=build(cfg.optimizer),
        precision=plan.precision,
        accumulates=plan.accumulate > 1,
    )
    if settings.adapter is None:
        raise ValueError("lora=none: there is nothing to train; choose lora=lora")
    bucket = plan.bucket(architecture)
    counting = costing(settings)
    try:
        costs = counting.count(bucket.shape, plan.batch_size, bucket.conditioning)
    except RuntimeError as error:
        if bucket.conditioning is None:
            raise
        raise ValueError(
            f"data.cache_dir={plan.cache_dir} holds samples that {architecture.pretrained} cannot take "
            f"({str(error).splitlines()[0]}); choose the model that it was prepared for"
        ) from error
    now = Choice(settings.memory, costs)
    samples = f"{plan.batch_size} sample{'s' * (plan.batch_size > 1)} of {bucket.name}"
    print(f"{architecture.pretrained}, {samples}, {now.name}")
    print("\n".join(lines_of(now, plan, decoding(architecture, settings.memory, bucket.shape))))
    found = [now]
    if plan.table:
        print("peaks, and which cards (GiB) they fit:")
        print(table([])[0])
        for choice in choices(counting, bucket, plan.batch_size):
            print(table([choice])[1], flush=True)
            found.append(choice)
    rows = [{"base": c.memory.base, "activations": c.memory.activations, **vars(c.costs)} for c in found]
    record(bucket=bucket.name, plan=rows[0], table=rows[1:])
    return rows


main = command("plan", run)

if __name__ == "__main__":
    main()
