"""A list of stages and the backend that runs them."""

from __future__ import annotations

from untwin.backends.base import Executor, Outcome, Progress
from untwin.backends.ledger import Ledger
from untwin.errors import ParameterError
from untwin.stages.base import CompositeStage, Stage, near_data


class Pipeline:
    """Stages in the order in which they run.

    Args:
        name: A name for logs and messages.
        description: What the pipeline is for.
        stages: First stages; more come with `add_stage`.
    """

    def __init__(
        self,
        name: str = "untwin",
        description: str | None = None,
        stages: list[Stage | CompositeStage] | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.stages: list[Stage | CompositeStage] = []
        for stage in stages or []:
            self.add_stage(stage)

    def add_stage(self, stage: Stage | CompositeStage) -> Pipeline:
        """Append a stage; returns the pipeline, so that calls can be chained."""
        if not isinstance(stage, Stage | CompositeStage):
            raise ParameterError(f"{stage!r} is not a stage")
        self.stages.append(stage)
        return self

    def run(
        self, executor: Executor | None = None, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> Outcome:
        """Run all stages.

        Args:
            executor: The backend; default: `LocalExecutor()`.
            progress: Gets told how far the work is.
            ledger: What is done already, and where to note what will be; without one nothing is reused, and no
                stage writes where there is something already.

        Raises:
            UntwinError: A user's mistake or damaged input, with a message that says what to do.
        """
        if not self.stages:
            raise ParameterError(f"pipeline {self.name!r} has no stages; add some with add_stage")
        if executor is None:
            from untwin.backends.local import LocalExecutor

            executor = LocalExecutor()
        if not isinstance(executor, Executor):
            raise ParameterError(f"{executor!r} is no executor; give one such as LocalExecutor(), or none")
        flat: list[Stage] = []
        with near_data(executor.call):
            for step in self.stages:
                flat.extend(step.stages() if isinstance(step, CompositeStage) else [step])
        for index, stage in enumerate(flat):
            if any(stage.name == other.name for other in flat[:index]):
                raise ParameterError(
                    f"pipeline {self.name!r} has the stage {stage.name!r} twice; run the two in pipelines of their own"
                )
            stage.check(flat[:index])
            if ledger is None:
                stage.check_output()
        return executor.execute(flat, progress, ledger)
