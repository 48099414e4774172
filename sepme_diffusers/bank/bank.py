"""ConceptBank: erasures by name, with what each was made from; on disk and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sepme_diffusers.bank.adapters import KnownDenoiser, choose
from sepme_diffusers.bank.card import Picture
from sepme_diffusers.bank.contents import read
from sepme_diffusers.bank.disk.drafting import Layout, write
from sepme_diffusers.bank.entry import Entry, Guarantee
from sepme_diffusers.bank.errors import PolicyError
from sepme_diffusers.bank.guarantees import Guarantees
from sepme_diffusers.bank.hub.pull import pull
from sepme_diffusers.bank.hub.push import HubBank
from sepme_diffusers.text.encoding import TOKENS
from sepme_diffusers.text.names import listed, some

# How many concepts a line and a table show.
_NAMED, _ROWS = 5, 20


@dataclass(frozen=True, repr=False)
class ConceptBank(HubBank, Mapping[str, Entry]):
    """Erasures by concept name, in the order in which they are always added up. Immutable.

    Args:
        base: What the increments were made on.
        entries: {concept name: entry}. Of a bank that was loaded, each is read when it is asked for.
        always: Names that may never be restored while the bank is loaded.
        origin: The Hub repository that it was pulled from, as last seen; set by `from_pretrained` and by
            `push_to_hub`, and no part of what the bank is.
        denoiser: The one that its adapters are made for, see `remembering`; no part of what the bank is.

    Raises:
        ValueError: If an entry's key is not its concept's name, two names look alike, widths, edited modules or
            further doors are not the base's, or `always` names a concept that is not there.

    Example:
        >>> from sepme_diffusers import pocket
        >>> bank = pocket.bank("styles")
        >>> bank["woodcut"].increment.form
        'text'
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ConceptBank:
        return self

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise KeyError(f"no concept {name!r} in this bank; it has {some(self.entries)}")
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        names = [*map(repr, list(self)[:_NAMED]), *(["..."] if len(self) > _NAMED else [])]
        concepts = "1 concept" if len(self) == 1 else f"{len(self)} concepts"
        return (
            f"ConceptBank({concepts}: {', '.join(names)}; base {self.base.name!r}, digest {self.digest[:12]})"
            if names
            else f"ConceptBank(no concepts; base {self.base.name!r}, digest {self.digest[:12]})"
        )

    def _repr_html_(self) -> str:
        """Tabulate the first concepts, for notebooks."""
        heads = ("concept", "form", "rank", "guarded prompts", "always erased")
        cells = [
            (name, outline.form, outline.ranks[TOKENS], len(outline.guards), "yes" if name in self.always else "")
            for name, outline in list(self.entries.outlines().items())[:_ROWS]
        ]
        more = f"<p>and {len(self) - _ROWS} more</p>" if len(self) > _ROWS else ""
        head = "".join(f"<th>{text}</th>" for text in heads)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in cells)
        summary = escape(f"{len(self)} concepts for {self.base.name}, digest {self.digest[:12]}")
        return f"<p>{summary}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal digits, of what the bank does: two banks with one digest erase the same.

        It covers the concepts' names in their order, every increment's digest, gates, guards and `always`.
        """
        hashed = hashlib.sha256(json.dumps(["sepme", len(self), list(self.always)]).encode())
        for name, outline in self.entries.outlines().items():
            line = [name, outline.digest, dict(outline.gates), outline.guards.set.id]
            hashed.update(json.dumps(line, sort_keys=True).encode())
        return hashed.hexdigest()

    def with_entries(self, entries: Iterable[Entry]) -> ConceptBank:
        """Add entries, or replace those of the same names; the others stay untouched.

        Args:
            entries: Made on this bank's base, or text-side ones made with the same text encoder. An entry does not
                say what it was made on, so of another base only other modules, heights and widths are noticed.

        Raises:
            ValueError: If an entry does not fit the bank, see the class.
        """
        return replace(self, entries=self.entries.joined_by(entries))

    def subset(self, names: Iterable[str]) -> ConceptBank:
        """Take these concepts alone, in the bank's order.

        Raises:
            TypeError: If a single string is given.
            KeyError: If one is not in the bank.
            PolicyError: If it would leave out a concept that the policy always erases.
        """
        wanted = listed(names)
        if unknown := [name for name in wanted if name not in self.entries]:
            raise KeyError(f"no concepts {some(unknown)} in this bank; it has {some(self.entries)}")
        if left_out := sorted(set(self.always) - set(wanted)):
            raise PolicyError(f"the bank's policy always erases {left_out}; keep them in the subset")
        return replace(self, entries=self.entries.only(wanted))

    def compact(self) -> ConceptBank:
        """Store every number in float16, a quarter to a half of what float32 takes; see `Increment.compact`.

        Per-module increments then are no PEFT LoRAs on disk, where A would stand once for each module:
        `export_adapters` makes these.
        """
        return self.with_entries(replace(entry, increment=entry.increment.compact()) for entry in self.values())

    def obey_policy(self, strengths: Mapping[str, float], name: str = "") -> None:
        """Check an erased set, {concept: strength}, against the policy.

        Args:
            strengths: The set.
            name: The bank's name, for the message.

        Raises:
            PolicyError: If it leaves out what the policy always erases, or weakens it.
        """
        if left_out := [concept for concept in self.always if strengths.get(concept, 0.0) < 1.0]:
            bank = f"bank {name!r}" if name else "the bank"
            raise PolicyError(f"the policy of {bank} always erases {left_out} at full strength; include them")

    def remembering(self, base: Any) -> ConceptBank:
        """Remember a denoiser, for which saves and pushes make adapters, as long as something else holds it.

        Banks that are derived from this one remember it too. It is never stored, and a pickled bank forgets it.

        Args:
            base: A pipeline or a denoiser. A pipeline that has several, or none, is forgotten.
        """
        try:
            return replace(self, denoiser=KnownDenoiser.of(base))
        except (TypeError, ValueError):
            return replace(self, denoiser=None)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        pictures: Iterable[Picture] = (),
        pack: bool = False,
        adapters: bool | None = None,
        base: Any = None,
    ) -> None:
        """Write the bank into a folder, wholly or not at all, whenever the process dies.

        New increments are written first, under names that nothing yet refers to; replacing the manifest is the one
        step that makes them the bank. Files that do not change are left alone.

        Args:
            folder: Made if missing. Concepts there that are not in this bank are removed.
            dtype: Of B or C; A becomes float32, because it carries the separability. Default: every number stays as it
                is. Compact increments stay as they are altogether.
            license: Of the bank, for its card. Default: what the card there says.
            pictures: Shown by the card, beside those it has, see `card_pictures`.
            pack: Write text-side increments into few new shards. Otherwise those that are new are added as one shard,
                and the rows of those that are gone stay in the older ones.
            adapters: Whether each concept also has a PEFT LoRA in a folder of its own, in float16, for tools that know
                no banks. A per-module increment is stored as one anyway. Default: they are made if a denoiser is known
                whose text-only Linears can hold them, and the bank has at most 200 concepts; those that are there are
                kept while their increments are the same. A larger bank has none.
            base: A pipeline or a denoiser, only read, to make adapters for. Default: what the bank was made on, as
                long as it is in memory; a bank that was loaded knows none.

        Raises:
            BankError: If the folder holds something else than a bank that can be read, the bank cannot be written
                down (metrics that are no JSON, say), or another process is saving there.
            ValueError: If adapters are asked for and no denoiser is known, or they cannot be made for this `base`.
                Nothing is written.
        """
        how = Layout(dtype, pack, *choose(self.base, self.entries, self.denoiser, adapters, base))
        write(self, Path(folder), how, license, pictures)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        concepts: Iterable[str] | None = None,
        subfolder: str = "",
        require_signature: str | Path | None = None,
        **options: Any,
    ) -> ConceptBank:
        """Load the bank in a folder or a Hub repository, every hash checked.

        The numbers of an increment are read, and checked again, when somebody asks for them.

        Args:
            pretrained_model_name_or_path: A folder, or a repository id.
            concepts: Load (and download) these alone. Default: all.
            subfolder: Where in the folder or repository the bank is.
            require_signature: A public key (PEM file): refuse a bank that its owner did not sign, see `signing`.
            options: Of `snapshot_download`: `revision`, `token`, `cache_dir`, `local_files_only`, ...

        Raises:
            BankError: If anything is missing, damaged, unsafe, not signed as required or of another format version,
                or the download broke off; nothing is loaded then.
            HfHubHTTPError: What huggingface_hub raises: not found, not allowed, ...
            KeyError: If the bank lacks one of `concepts`.
            PolicyError: If `concepts` leaves out one that the bank's policy always erases.
        """
        if options.pop("proxies", None):
            raise ValueError(
                f"huggingface_hub {version('huggingface_hub')} takes no proxies=; set HTTPS_PROXY, or a client with "
                "huggingface_hub.set_client_factory"
            )
        wanted = None if concepts is None else listed(concepts)
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            contents, origin = read(folder / subfolder, wanted, require_signature), None
        else:
            repository = str(pretrained_model_name_or_path)
            contents, origin = pull(repository, wanted, subfolder, require_signature, options)
        return cls(contents.base, contents.entries, contents.always, origin)

    @cached_property
    def guarantees(self) -> Mapping[str, Guarantee]:
        """What the bank promises for each guarded prompt and each concept's name, whichever concepts are erased."""
        return Guarantees(self.entries.outlines())
