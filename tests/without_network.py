"""Runs a script that ends at once if it calls out to the network: ``python without_network.py SCRIPT ARGUMENTS``.

An error would not do: libraries that count their users pass over it.
"""

import os
import runpy
import socket
import sys
import traceback

_LOOPBACK = ("localhost", "127.0.0.1", "::1", None)
_look_up, _connect = socket.getaddrinfo, socket.socket.connect


def look_up(host, *args, **kwargs):
    _refuse(host)
    return _look_up(host, *args, **kwargs)


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        _refuse(address[0])
    return _connect(self, address)


def _refuse(host):
    if host not in _LOOPBACK:
        traceback.print_stack()
        print(f"called out to {host}", file=sys.stderr, flush=True)
        os._exit(86)


socket.getaddrinfo, socket.socket.connect = look_up, connect
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
