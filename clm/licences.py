"""Licences as the Hub's model cards name them.

In: the licence ids of datasets. Out: the one id for the card's header, where there is one.
"""

from __future__ import annotations

# Licence ids that the Hub's model card header knows, among those that text datasets carry.
# Source: https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gfdl gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit mpl-2.0
    ms-pl ncsa odbl odc-by ofl-1.1 osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
HUB_LICENCES = frozenset(_HUB_LICENCES.split())
_HUB_SPELLINGS = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl"}  # SPDX -> the Hub's id


def hub_licence(licences: list[str | None]) -> str | None:
    """The Hub's id of the one licence that all datasets share; None where they differ or the Hub has no id for it."""
    ids = {_HUB_SPELLINGS.get(licence.lower(), licence.lower()) if licence else None for licence in licences}
    only = ids.pop() if len(ids) == 1 else None
    return only if only in HUB_LICENCES else None
