"""Small files of several formats, for the tests of the readers."""

from __future__ import annotations

CODE = "def f(x):\n    if x:\n\n        return  1\n\n\ndef g():\n\treturn 2"
PAGE = f"""<html><head><title>Sorting
 lists</title></head><body><nav><a href="/">home</a> <a href="/x">menu</a></nav><article><h1>Sorting</h1>
<p>Lists have a method that sorts them in place, and there is a function that returns a new list, as shown here.</p>
<pre><code>{CODE}
</code></pre><p>Both of them take a key function and a flag that reverses the order of the result.</p>
<pre>one<br>  two<br><br>three</pre><ul><li>first item</li><li>second <b>item</b></li></ul>
<p>The end &amp; more.</p></article><footer>copyright</footer></body></html>"""


WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo><sitename>W</sitename></siteinfo>
<page><title>Anarchism &amp; co</title><ns>0</ns><id>12</id><revision><id>99</id>
<text xml:space="preserve">'''Bold''' is
a [[link|word]].&lt;ref&gt;{{cite}}&lt;/ref&gt; {{Infobox|a={{b}}}}
== Head ==
* item [http://x.org site]
{| class="x"
| cell
|}
&lt;syntaxhighlight lang="c"&gt;
if (a[[0]])

    b();
&lt;/syntaxhighlight&gt;
[[Category:X]] [[File:a.jpg|thumb|a [[b]] c]]</text></revision></page>
<page><title>Talk:X</title><ns>1</ns><id>13</id><revision><text>talk</text></revision></page>
<page><title>R</title><ns>0</ns><id>14</id><redirect title="Y"/><revision><text>#REDIRECT [[Y]]</text></revision></page>
<page><title>Last</title><ns>0</ns><id>15</id><revision><text>last</text></revision></page>
</mediawiki>"""


POSTS = """<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="5" PostTypeId="2" ParentId="4" Score="9" Body="&lt;p&gt;best&lt;/p&gt;" />
  <row Id="4" PostTypeId="1" AcceptedAnswerId="6" Score="3" Title="How?" Tags="&lt;c&gt;&lt;io&gt;"
    Body="&lt;p&gt;Why &amp;amp; how?&lt;/p&gt;&lt;pre&gt;&lt;code&gt;a&#xA;&#xA;    b&lt;/code&gt;&lt;/pre&gt;"
    ContentLicense="CC BY-SA 4.0" />
  <row Id="6" PostTypeId="2" ParentId="4" Score="-1" Body="&lt;p&gt;accepted&lt;/p&gt;" />
  <row Id="7" PostTypeId="1" Score="0" Title="Other" Body="x" />
  <row Id="x" PostTypeId="1" Score="0" Title="Broken" Body="x" />
  <row Id="8" PostTypeId="5" Body="wiki" />
</posts>
"""


def warc(kind: str, content: bytes, number: int, length: int | None = None, extra: str = "") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n{extra}"
    size = len(content) if length is None else length
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + content + b"\r\n\r\n"


def http(body: bytes, headers: str = "Content-Type: text/html") -> bytes:
    return f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + body
