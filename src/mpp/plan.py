"""`python -m mpp.plan`: what a run takes in memory and FLOPs, counted without weights and without a GPU."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from mpp.config import build, check_config, command
from mpp.logs import record

if TYPE_CHECKING:
    from mpp.memory.settings import Memory
    from mpp.training.planning import Choice


def run(cfg: DictConfig) -> list[dict[str, Any]]:
    """Count as configured.

    Returns:
        Each way to run that was counted, the one that is set first.

    Raises:
        ValueError: Bad settings, a cache that cannot be read, or a model whose shape is not known.
    """
    check_config(cfg)
    from mpp.models.streamed import check_count
    from mpp.training.choosing import fastest, is_open
    from mpp.training.measuring import Run
    from mpp.training.planning import Choice, choices, costing, decoding, lines_of, table

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

    def counted(memory: "Memory") -> "Choice":
        costs = counting.with_memory(memory).count(bucket.shape, plan.batch_size, bucket.conditioning)
        return Choice(memory, costs, counting.weights)

    chosen = None
    try:
        if wanted.card is not None and is_open(wanted):
            chosen = fastest(wanted, counted, wanted.card * 2**30)
        now = counted(wanted.settled) if chosen is None else chosen.choice
    except RuntimeError as error:
        if bucket.conditioning is None:
            raise
        raise ValueError(
            f"data.cache_dir={plan.cache_dir} holds samples that {architecture.pretrained} cannot take "
            f"({str(error).splitlines()[0]}); choose the model that it was prepared for"
        ) from error
    samples = f"{plan.batch_size} sample{'s' * (plan.batch_size > 1)} of {bucket.name}"
    print(f"{architecture.pretrained}, {samples}, {now.name}")
    if chosen is not None:
        print(f"chosen for {wanted.card:g} GiB" + ("" if chosen.fits else ", which nothing fits on this base"))
    print("\n".join(lines_of(now, plan, decoding(architecture, settings.memory, bucket.shape))))
    found = [now]
    if plan.table:
        print("peaks in GiB with all blocks on the GPU and with two at once, and how many cards of so many GiB hold:")
        print(table([])[0])
        for choice in choices(counting, bucket, plan.batch_size):
            print(table([choice])[1], flush=True)
            found.append(choice)
    named = ("base", "activations", "resident", "teacher")
    rows = [{**{name: getattr(c.memory, name) for name in named}, **vars(c.costs)} for c in found]
    record(bucket=bucket.name, plan=rows[0], table=rows[1:])
    return rows


main = command("plan", run)

if __name__ == "__main__":
    main()
