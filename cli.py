"""What the command lines of all scripts share.

Options are checked before any work is done, files are written whole or not at all, and what the
user can mend is one line on stderr and exit status 2.
"""
import argparse
import contextlib
import datetime
import glob
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import torch
import triton

import parallel
from ds_attention import DSConfig

HERE = Path(__file__).resolve().parent  # the project's directory

# ---------------------------------------------------------------- options


class Number:
    """The type of an option: an int or float from `low` to `high`, both included."""

    def __init__(self, kind, low=None, high=2**31 - 1):
        self.kind, self.low, self.high = kind, low, high
        self.__name__ = kind.__name__  # in argparse's messages

    def __call__(self, text):
        return self.kind(text)

    def check(self, name, value):
        if self.low is not None and value < self.low:
            raise ValueError(f"{name}={value}: must be at least {self.low}")
        if value > self.high:
            raise ValueError(f"{name}={value}: must be at most {self.high}")


class InputFile:
    """The type of an option: a file that can be read."""

    __name__ = "file"

    def __call__(self, text):
        return text

    def check(self, name, value):
        if os.path.isdir(value):
            raise ValueError(f"{name}={value}: is a directory; give a file")
        with open(value, "rb"):
            pass  # an OSError says what is wrong with it


class OutputFile:
    """The type of an option: a file that can be written, in a directory that is there."""

    __name__ = "file"

    def __call__(self, text):
        return text

    def check(self, name, value):
        check_output(value)


def check_output(path):
    """Raises ValueError or OSError if no file can be written to `path`, also by `writing`."""
    path, directory = Path(path), Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a file in it")
    if not directory.is_dir():
        raise ValueError(f"{path}: no such directory to write to")
    replaced = path.is_file() or not path.exists()  # devices and pipes are not
    for needed in [path] * path.exists() + [directory] * replaced:
        if not os.access(needed, os.W_OK):
            raise PermissionError(f"{path}: cannot be written to")


class StoreOnce(argparse.Action):
    """What an option does if nothing else is said: keeps its value. Given twice it is refused."""

    namespace = None

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string and self.namespace is namespace:
            parser.error(f"{option_string} is given twice")
        self.namespace = namespace
        setattr(namespace, self.dest, values)


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, as a ValueError, before any work is done."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.register("action", None, StoreOnce)

    def error(self, message):
        raise ValueError(f"{message}; see --help")

    def parse_known_args(self, args=None, namespace=None):  # which subcommands' parsers go through
        args, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            given = getattr(args, action.dest, None)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and value != action.default:
                    check_value(action.dest, value, action.type)
        return args, unknown


def check_value(name, value, kind):
    """Raises ValueError or OSError, in one line, for a value that no option takes, or not one of
    its type `kind`."""
    if value == "":
        raise ValueError(f"{name} is empty: give a value, or leave the option out")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}={value!r}: has a zero byte in it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    if hasattr(kind, "check"):
        kind.check(name, value)


def parse_sizes(name, text, example, by="x"):
    """"4x16384,16x16384" -> [(4, 16384), (16, 16384)]."""
    try:
        sizes = [tuple(map(int, part.split(by))) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text}: must look like {example}") from None
    if any(len(size) != 2 or min(size) < 1 or max(size) >= 2**31 for size in sizes):
        raise ValueError(f"{name}={text}: must look like {example}, all sizes from 1 to 2**31 - 1")
    return sizes


def pick_device(name):
    """The --device argument -> "cuda" or "cpu"; processes that torchrun started are connected.
    Raises ValueError for a GPU that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device={name}: must be cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: no GPU that torch can use; run with --device cpu")
    parallel.connect(name)
    return name


def default_dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


# ---------------------------------------------------------------- options of a sparse model


def label_bits(text):
    """DSConfig.label_bits of a command line's text: 4, or of "8x4,48x2" ((8, 4), (48, 2))."""
    try:
        bits = int(text) if text.isdigit() else tuple(
            tuple(map(int, part.split("x"))) for part in text.split(","))
        DSConfig(label_bits=bits).widths(2**16)  # of any head
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"label_bits={text}: must be 1, 2, 4, 8, or dims x bits, the most bits first, as "
            "8x4,48x2: whole bytes of each and whole 32-bit words in all") from None
    return bits


def widths_name(widths):
    """((8, 4), (48, 2)) -> "8 x 4, 48 x 2", which label_bits reads, too."""
    return ", ".join(f"{dims} x {bits}" for dims, bits in widths)


def bits_of(widths):
    """Label widths as rows of bench.py have them."""
    return widths[0][1] if len(widths) == 1 else widths_name(widths)


def add_sparsity_arguments(parser):
    """The DSConfig fields that a command line offers; defaults are read from the dataclass."""
    default = DSConfig()
    parser.add_argument("--sparsity", type=Number(float, 1, 1e6), default=default.sparsity,
                        metavar="R",
                        help=f"attend to 1/R of the tokens, {default.min_tokens} at least, with "
                             "labels of 1/R of K's bytes; 1: dense (default %(default)g)")
    parser.add_argument("--n_tokens", type=Number(int, 1),
                        help="attend to this many tokens instead of a share")
    parser.add_argument("--label_bits", type=label_bits, metavar="BITS",
                        help="a label's dims x bits of each width, the most important first, as "
                             "8x4,48x2; or 1, 2, 4 or 8 bits for as many dims as --sparsity has "
                             "room for (default: many dims of few bits, 8x4,48x2 in 16 bytes)")
    parser.add_argument("--channels", type=InputFile(), metavar="FILE",
                        help="label maps of calibrate.py --out (default: the checkpoint's own)")
    parser.add_argument("--dense_layers", type=Number(int, 0), default=default.dense_layers,
                        help="first layers that attend to everything (default %(default)s)")


def add_quantize_argument(parser):
    parser.add_argument("--quantize", choices=("int8",),
                        help="round the linear layers' weights to 8 bits, with a scale per output: "
                             "half the bytes of a step's weights (default: as they are)")


def sparsity_from(args):
    """DSConfig of the arguments, or None for dense. Raises ValueError for values out of bounds."""
    if args.sparsity == 1 and args.n_tokens is None:
        for name in ("label_bits", "channels"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is for a sparse step, and --sparsity 1 is dense: take a "
                                 "larger one, or leave this out")
        return None
    names = {f.name for f in fields(DSConfig)}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    if args.sparsity == 1:  # --n_tokens alone decides how many, the default how large labels are
        del chosen["sparsity"]
    return DSConfig(**chosen)


def check_layers(ds, config):
    """Raises ValueError for a DSConfig, if it is one, of which no layer of the model is sparse."""
    if ds and ds.dense_layers >= config.n_layers:
        raise ValueError(f"dense_layers={ds.dense_layers}: of {config.n_layers} layers none is "
                         "left to be sparse; take fewer, or --sparsity 1 for dense")


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path, directory=False):
    """A file, or a directory, beside `path` to write to: it takes the place of that when the block
    ends.

    If that fails, `path` is as it was and nothing is left behind; what a killed process left is
    removed by the next that writes there. Devices and pipes are written as they are. Of several
    processes of a run the first alone writes.
    """
    if parallel.rank():
        yield Path(os.devnull)
        return
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not is_running(left.name.split(".")[-2]):
            remove(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)  # of a killed process that had our number
    try:
        temporary.mkdir() if directory else temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes a file for its owner alone
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path):
    """A file, or a directory with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_running(pid):
    """Whether a process of this number, as text, is there."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True


def read_json_lines(path):
    """The objects in a file of one JSON object a line; none if there is no such file. Raises
    ValueError, with the line's number, for what is none."""
    rows, path = [], Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else (), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object; was it cut off?")
        rows.append(row)
    return rows


def ends_a_line(path):
    """Whether the last byte of a file that is not empty ends a line."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def append_json_lines(path, rows):
    """Adds a line for each object. Where that fails, on a full disk say, the file is as it was. Of
    several processes of a run the first alone writes."""
    if parallel.rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        data, written = "".join(json.dumps(row) + "\n" for row in rows).encode(), 0
        if before and not ends_a_line(path):
            data = b"\n" + data
        try:
            written = file.write(data)
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            if written < len(data) and path.is_file():
                file.truncate(before)
        if written < len(data):
            raise OSError(f"{path}: not all of it could be written; is the disk full?")


def provenance(device):
    """What a row was measured with: gpu, and gpus if several, torch, triton, commit, date."""
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE,
                                capture_output=True, text=True).stdout.strip()
    return {"gpu": torch.cuda.get_device_name() if device != "cpu" else "none (CPU)",
            **({"gpus": parallel.size()} if parallel.size() > 1 else {}),
            "torch": torch.__version__, "triton": triton.__version__,
            "commit": commit or "unknown", "date": datetime.date.today().isoformat()}


# ---------------------------------------------------------------- running


def run_command(main, several=False):
    """Runs a script's main(). What the user can mend is one line on stderr and exit status 2,
    without a traceback. several: whether torchrun may start it as several processes."""
    def stop(number, _):  # by an exception: what was begun is tidied up
        if parallel.size() > 1:  # torchrun ends those that are left
            raise ConnectionError(parallel.LOST)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    parallel.mute()
    try:
        if parallel.size() > 1 and not several:
            raise ValueError(f"{Path(sys.argv[0]).name} runs as one process: leave out torchrun")
        main()
        sys.stdout.flush()
        parallel.disconnect()
    except BrokenPipeError:  # as by `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if parallel.size() > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
        if not parallel.fails_first():
            sys.exit(2)
        if not isinstance(error, (ValueError, OSError, OverflowError, MemoryError,
                                  torch.OutOfMemoryError)):
            raise
        message = str(error).split("\n")[0] if isinstance(error, torch.OutOfMemoryError) else error
        print("error:", *(str(message) or type(error).__name__).split(), file=sys.stderr)
        sys.exit(2)
