"""A library of experiment trackers that keeps what it is given."""

import types


class StandIn(types.ModuleType):
    """The functions of wandb's interface that both libraries have; it keeps what it is given."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls = []

    def init(self, *, project, name, resume, config=None, id=None):
        given = {"project": project, "name": name, "resume": resume, "config": config, "id": id}
        self.calls.append(("init", given))
        if project == "forbidden":
            raise RuntimeError("no permission\nfor this project")

    def define_metric(self, name, *, step_metric):
        self.calls.append(("define_metric", step_metric))

    def log(self, metrics, *, step=None):
        self.calls.append(("log", metrics | ({} if step is None else {"step": step})))

    def finish(self):
        self.calls.append(("finish", None))
