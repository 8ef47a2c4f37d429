"""Serve a WSGI application of OpenStack: serve.py ADDRESS:PORT WORKERS MODULE [OPTION...]."""

import importlib
import sys

from gunicorn.app.base import BaseApplication

where, workers, module, *options = sys.argv[1:]
# What is served reads the command line for options of its own.
sys.argv = [module.partition(".")[0] + "-api", *options]


class _Server(BaseApplication):
    def load_config(self):
        settings = {
            "bind": where,
            "workers": int(workers),
            "worker_class": "gthread",
            "threads": 16,
            "timeout": 180,
            "keepalive": 75,
            "accesslog": "-",
            "control_socket_disable": True,
        }
        for name, value in settings.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self):
        return importlib.import_module(module).application


_Server().run()
