"""What runs on a machine of a shaped network: obeys lines of JSON, ``[function, argument...]``, each answered by one line of JSON."""

import hashlib
import json
import socket
import struct
import sys
import time

PORT = 5000
END = 0xFFFFFFFF
sockets = {}


def listen():
    sockets["listener"] = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    for name in ("udp", "group"):
        sockets[name] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sockets[name].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)  # the system makes it what it allows at most
    sockets["udp"].bind(("0.0.0.0", PORT))
    sockets["group"].bind(("224.0.0.251", PORT + 1))


def accept():
    sockets["tcp"], _ = sockets["listener"].accept()
    sockets["tcp"].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect(host, seconds=20.0):
    """Whether a connection comes about."""
    try:
        sockets["tcp"] = socket.create_connection((host, PORT), timeout=seconds)
    except OSError as error:
        return str(error)
    sockets["tcp"].settimeout(60.0)
    sockets["tcp"].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ""


def ping(count, size):
    """Round trips in seconds of ``count`` messages of ``size`` bytes."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        say(size)
        hear(size, 60.0)
        found.append(time.perf_counter() - started)
    return found


def echo(count, size):
    for _ in range(count):
        hear(size, 60.0)
        say(size)


def say(size):
    sockets["tcp"].sendall(bytes(size))


def hear(size, seconds):
    """How many of ``size`` bytes came before nothing had come for so long."""
    sockets["tcp"].settimeout(seconds)
    left = size
    try:
        while left:
            part = len(sockets["tcp"].recv(left))
            if not part:
                break
            left -= part
    except TimeoutError:
        pass
    return size - left


def send_stream(size, seed):
    """Send pseudo-random bytes; their digest."""
    data = hashlib.shake_128(str(seed).encode()).digest(size)
    sockets["tcp"].sendall(data)
    return hashlib.sha256(data).hexdigest()


def receive_stream(size):
    """The digest of what came, and the seconds from the first part to the last."""
    digest, left, started, ended = hashlib.sha256(), size, None, None
    while left:
        part = sockets["tcp"].recv(min(left, 1 << 20))
        ended = time.perf_counter()
        started = started or ended
        digest.update(part)
        left -= len(part)
    return [digest.hexdigest(), ended - started]


def send_numbers(host, count, size, port=PORT):
    """Datagrams with the numbers from 0 up, then enough of the last for one to arrive; the seconds that it took."""
    channel, started = sockets["udp"], time.perf_counter()
    channel.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own_address()))
    for number in [*range(count), *[END] * 40]:
        channel.sendto(struct.pack("!I", number).ljust(size, b"."), (host, port))
    return time.perf_counter() - started


def receive_numbers(name="udp", count=0):
    """The numbers in order of arrival: so many, or else all up to the end."""
    if name == "group":
        sockets[name].setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.0.251") + socket.inet_aton(own_address()))
        print(json.dumps("listening"), flush=True)
    found = []
    while True:
        (number,) = struct.unpack_from("!I", sockets[name].recv(2048))
        if number != END:
            found.append(number)
        elif not count:
            return found
        if count and len(found) == count:
            return found


def own_address():
    return sys.argv[1]


for line in sys.stdin:
    function, *arguments = json.loads(line)
    print(json.dumps(globals()[function](*arguments)), flush=True)
