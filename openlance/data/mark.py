"""The mark of media that a model made: IPTC's digital source type, in XMP.

Platforms and tools that label generated media look for it there. It is a statement of the file about itself:
whoever edits the file can remove it. A signature that cannot be removed unseen (C2PA) needs a certificate.
"""

from __future__ import annotations

import struct

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool="openlance"
    Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
"""An XMP packet; PNG holds it in the text chunk `XMP_CHUNK`, JPEG and WebP where Pillow puts `xmp`."""

XMP_CHUNK = "XML:com.adobe.xmp"

_BOX_ID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")  # of XMP in ISO media files (XMP, part 3)


def xmp_box() -> bytes:
    """The packet as a box of an MP4 or MOV file, to be appended to it; players pass over it."""
    content = _BOX_ID + XMP.encode()
    return struct.pack(">I4s", 8 + len(content), b"uuid") + content
