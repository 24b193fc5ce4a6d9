"""Text to token ids and back, by libllama's own vocabulary code. Knows no weights: only the vocabulary of the file is loaded.

llama_cpp is imported when a tokenizer is loaded, not before: a worker that never sees text does without its memory (15 MB, measured 2026-11 on Linux).
"""

import codecs
import ctypes
import threading
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, Self

from yoke.core.errors import BackendError, InvariantError, ModelError
from yoke.weights.gguf import ArrayInfo, GgufFile

_TOKENS: Final = "tokenizer.ggml.tokens"
_ERROR_LEVEL: Final = 4
_MAX_TOKEN_BYTES: Final = 1 << 16

_library: dict[str, Any] = {}
_library_lock = threading.Lock()
_errors: list[str] = []


def libllama() -> ModuleType:
    """The llama_cpp module with its library loaded and its log silenced. The log is one for the whole process.

    Raises
    ------
    BackendError
        if llama_cpp is not installed or its library does not load.
    """
    with _library_lock:
        if "module" not in _library:
            try:
                import llama_cpp
            except (ImportError, OSError, RuntimeError) as error:
                raise BackendError(f"llama_cpp does not load: {error}; install llama-cpp-python") from error
            # The callback object must live as long as the library may call it.
            _library["callback"] = llama_cpp.llama_log_callback(_keep_errors)
            llama_cpp.llama_log_set(_library["callback"], ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _library["module"] = llama_cpp
        _errors.clear()
        module: ModuleType = _library["module"]
        return module


def library_error() -> str:
    """The first error line that libllama logged since :func:`libllama` was last called, which is the one with the reason."""
    return _errors[0] if _errors else "libllama gave no reason"


def _keep_errors(level: int, text: bytes, _user_data: object) -> None:
    if level == _ERROR_LEVEL and not _errors:
        _errors.append(text.decode("utf-8", "replace").strip())


class Tokenizer:
    """The vocabulary of a GGUF file. Build it with :meth:`load`; use it as a context manager or call :meth:`close`.

    ``bos`` and ``eos`` are the tokens that begin and end a text, or None; ``add_bos`` says whether :meth:`encode` with ``add_special`` puts ``bos`` first.
    All methods but :meth:`close` may be called from any thread.
    """

    def __init__(self, library: ModuleType, model: object, *, default_end: int | None, specials: tuple[int | None, int | None]) -> None:
        self._library = library
        self._model = model
        self._vocabulary = library.llama_model_get_vocab(model)
        self._default_end = default_end
        self.bos, self.eos = specials
        self.n_tokens = int(library.llama_vocab_n_tokens(self._vocabulary))
        self.add_bos = bool(library.llama_vocab_get_add_bos(self._vocabulary)) and self.bos is not None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the vocabulary of a GGUF file; its weights are not touched.

        Raises
        ------
        ModelError
            if the file is no GGUF, has no vocabulary, contradicts itself, or libllama refuses it.
        BackendError
            if llama_cpp is not installed.
        """
        with GgufFile.open(path) as file:
            _check_vocabulary(file)
            specials = (_special(file, "bos"), _special(file, "eos"))
        library = libllama()
        parameters = library.llama_model_default_params()
        parameters.vocab_only = True
        parameters.use_mmap = True
        model = library.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise ModelError(f"{path}: libllama cannot load its vocabulary: {library_error()}")
        # Without an entry, libllama assumes an id of its own (11 for byte-level BPE), which is then an ordinary token.
        assumed = int(library.llama_vocab_eos(library.llama_model_get_vocab(model)))
        return cls(library, model, default_end=assumed if specials[1] is None else None, specials=specials)

    def close(self) -> None:
        """Free the vocabulary; no other thread may be using it. Calling it twice is allowed."""
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = self._vocabulary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``.

        Parameters
        ----------
        text : any text; lone surrogates become question marks.
        add_special : put the first and last token around it, where the vocabulary asks for them.
        parse_special : read the texts of control tokens as those tokens. Never for what a user typed.
        """
        data = text.encode("utf-8", "replace")
        # Every token but the special ones stands for at least one byte.
        capacity = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * capacity)()
            n = self._library.llama_tokenize(self._opened(), data, len(data), tokens, capacity, add_special, parse_special)
            if n >= 0:
                return list(tokens[:n])
            capacity = -n

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, control tokens by their text; may be a part of a character.

        Raises
        ------
        ModelError
            if the token is outside the vocabulary.
        """
        if not 0 <= token < self.n_tokens:
            raise ModelError(f"token {token} is outside the vocabulary of {self.n_tokens}")
        size = 64
        while size <= _MAX_TOKEN_BYTES:
            buffer = ctypes.create_string_buffer(size)
            n = self._library.llama_token_to_piece(self._opened(), token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n if n > -_MAX_TOKEN_BYTES else _MAX_TOKEN_BYTES + 1
        raise ModelError(f"token {token} stands for more than {_MAX_TOKEN_BYTES} bytes")

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return token != self._default_end and 0 <= token < self.n_tokens and bool(self._library.llama_vocab_is_eog(self._opened(), token))

    def _opened(self) -> object:
        # libllama would read freed memory.
        if self._vocabulary is None:
            raise InvariantError("the tokenizer is used after it was closed")
        return self._vocabulary


class IncrementalDecoder:
    """Bytes of tokens to text, never splitting a character: what is incomplete waits for the next token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The text that is complete with ``data``. Bytes that can never become a character are U+FFFD."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


def _check_vocabulary(file: GgufFile) -> None:
    """Refuse what makes libllama abort the process instead of returning an error."""
    # libllama names empty tokens like this, and aborts if the name is taken.
    tokens = [token or b"[EMPTY_%d]" % i for i, token in enumerate(file.raw_strings(_TOKENS))]
    if not tokens:
        raise ModelError(f"{file.path}: its vocabulary is empty")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens) - len(set(tokens))} tokens of its vocabulary are there twice; convert the model again")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        value = file.metadata.get(key)
        if isinstance(value, list | ArrayInfo) and len(value) != len(tokens):
            raise ModelError(f"{file.path}: {key} has {len(value)} entries for {len(tokens)} tokens; convert the model again")


def _special(file: GgufFile, name: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = file.metadata[_TOKENS]
    if isinstance(value, int) and isinstance(tokens, list | ArrayInfo) and 0 <= value < len(tokens):
        return value
    # Sentencepiece models that do not say it have 1 and 2 (llama-vocab.cpp).
    return {"bos": 1, "eos": 2}[name] if value is None and file.metadata.get("tokenizer.ggml.model") == "llama" else None
