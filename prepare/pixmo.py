"""
PixMo of Ai2: captions, questions and counts for photographs that it names by URL. ODC-BY 1.0,
https://huggingface.co/collections/allenai/pixmo.

--source is a parquet file of pixmo-cap, -cap-qa, -ask-model-anything, -count or -points, or a folder of them;
--images a folder that keeps what is fetched, one file a URL, and manifest.jsonl, one line a URL with what
became of it. A fetch that is killed goes on there; what failed is asked for again with --retry_failed=true. A
quarter of the URLs are dead. For a million pictures take img2dataset, whose output `python data.py parquet`
reads.
"""

import hashlib
import http.client
import ipaddress
import json
import socket
import sqlite3
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from plumbing.console import progress
from plumbing.pictures import rgb_picture
from plumbing.tables import OnDisk, is_unicode, open_parquet, stream
from prepare import files_below, say_where, split_of_name, turns

COLUMNS = ('image_url', 'image_sha256', 'caption', 'question', 'answer', 'messages', 'label', 'count')
# what a URL may hold besides letters and digits; anything else, a space, say, is escaped
KEPT = "%/:=&?~#+!$,;'@()*[]|"


def rows(config):
    """Fetches the pictures, then yields (split, row) for every caption, question, turn and count."""
    files = files_below(config, ('.parquet',))
    if not files:
        raise FileNotFoundError(f'{config.source}: no such file, and no folder with .parquet files')
    if not config.images:
        raise ValueError('--images is needed: the folder that keeps the pictures that are fetched')
    folder = Path(config.images)
    splits = published_order(files)
    say_where(splits, config.source)
    urls = urls_of(path for path, _ in splits)
    fetch(urls, folder, config)
    for path, split in splits:
        for i, (_, row) in enumerate(stream(path, COLUMNS)):
            name = f'{path.stem}-{i}'
            _, reason = urls.of(row['image_url']) if is_url(row['image_url']) else (None, 'no URL')
            if reason:
                yield split, dict(missing=reason, sample_id=name)
                continue
            picture = dict(image=folder / file_name(row['image_url']), caption=row.get('caption'))
            for question in questions_of(row, name):
                yield split, picture | question


def published_order(files):
    """[(file, split or None)]: files for validation and test, which few of the sets have, keep their split,
    and come first, so that their pictures keep out of training; the others are divided."""
    told = [(path, split_of_name(path.name)) for path in files]
    kept = [(path, None if split == 'train' else split) for path, split in told]
    return sorted(kept, key=lambda both: (both[1] is None, both[0]))


def is_url(url):
    return isinstance(url, str) and url != '' and is_unicode(url)


class Urls:
    """The different URLs of a set, in order; of each the sha256 that its picture should have, or None, and
    why there is no picture: '' where there is one, None where that is not known. In a temporary file: a
    million URLs take little memory."""

    def __init__(self):
        self.table = sqlite3.connect('', isolation_level=None)
        self.table.execute('PRAGMA cache_size = -32000')  # kB
        self.table.execute('CREATE TABLE urls (digest BLOB UNIQUE, url, expected, reason)')
        self.table.execute('BEGIN')

    def add(self, url, expected):
        known = 'UPDATE SET expected = excluded.expected WHERE expected IS NULL'
        self.table.execute(f'INSERT INTO urls VALUES (?, ?, ?, NULL) ON CONFLICT (digest) DO {known}',
                           (digest_of(url), url, expected))

    def settle(self, url, reason):
        self.table.execute('UPDATE urls SET reason = ? WHERE digest = ?', (reason, digest_of(url)))

    def of(self, url):
        """-> (sha256 of the picture, why there is none), or (None, None) of an unknown URL"""
        query = 'SELECT expected, reason FROM urls WHERE digest = ?'
        return self.table.execute(query, (digest_of(url),)).fetchone() or (None, None)

    def __iter__(self):
        """Yields (url, why there is no picture)."""
        return self.table.execute('SELECT url, reason FROM urls ORDER BY rowid')


def urls_of(files):
    """-> Urls. Raises: ValueError."""
    urls = Urls()
    for path in files:
        names = open_parquet(path).schema_arrow.names
        if 'image_url' not in names:
            raise ValueError(f'{path}: no column image_url; it has {", ".join(names)}; pictures inside: '
                             f'python data.py parquet')
        for _, row in stream(path, ('image_url', 'image_sha256')):
            if is_url(row['image_url']):
                urls.add(row['image_url'], row.get('image_sha256'))  # not every set gives it
    return urls


def questions_of(row, name):
    """Yields the questions about the picture of a row: how many there are of something, or the turns of a
    talk, or none, where it has only a caption."""
    if row.get('count') is not None:
        question = f"How many {row['label']} are there?" if row.get('label') else None
        yield dict(question=question, answer=str(row['count']), sample_id=name, type='count')
        return
    try:
        talk = list(turns(row.get('question'), row.get('answer'), row.get('messages')))
    except ValueError as e:
        yield dict(bad=str(e), sample_id=name)
        return
    for k, (question, answer) in enumerate(talk):
        yield dict(question=question, answer=answer, sample_id=f'{name}-{k}' if k else name)


# ----------------------------------------------------------------------------
# fetching


def digest_of(url):
    return hashlib.sha256(url.encode()).digest()


def file_name(url):
    return digest_of(url).hex()


def fetch(urls, folder, config):
    """Fetches the pictures of `urls` into a folder, `config.workers` at a time, and notes there what became
    of each."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / 'manifest.jsonl'
    read_manifest(manifest, urls)
    left = OnDisk()
    n_urls = 0
    for url, reason in urls:
        n_urls += 1
        is_lost = reason == '' and not (folder / file_name(url)).is_file()
        if reason is None or is_lost or (reason and config.retry_failed):
            left.append(url)
    start = time.time()
    n_done = 0
    with ThreadPoolExecutor(config.workers) as pool, open(manifest, 'a') as out:
        if is_torn(manifest):  # a run was killed in a line
            out.write('\n')
        one = partial(fetch_one, folder=folder, config=config)
        ahead = iter(left)
        under_way = set()
        try:
            while True:
                for url in islice(ahead, 4 * config.workers - len(under_way)):
                    under_way.add(pool.submit(one, url, urls.of(url)[0]))
                if not under_way:
                    break
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    entry = future.result()
                    urls.settle(entry['url'], entry['reason'])
                    out.write(json.dumps(entry) + '\n')
                out.flush()
                n_done += len(finished)
                progress('fetching', n_done, len(left), start)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failed = Counter(reason.split(':')[0] for _, reason in urls if reason)
    reasons = ', '.join(f'{n} {reason}' for reason, n in failed.most_common())
    print(f'\n{n_urls} pictures asked for, {n_urls - failed.total()} there, {failed.total()} not: '
          f'{reasons or "none"}')


def read_manifest(manifest, urls):
    """Notes in `urls` what earlier runs found."""
    if not manifest.is_file():
        return
    with open(manifest) as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the end of a killed run
                continue
            reason = entry['reason']
            if not reason:
                expected, _ = urls.of(entry['url'])
                reason = wrong_sum(entry.get('sha256'), expected)
            urls.settle(entry['url'], reason)


def is_torn(path):
    """Whether the last line of a file has no end."""
    with open(path, 'rb') as f:
        n = f.seek(0, 2)
        f.seek(max(0, n - 1))
        return f.read() not in (b'', b'\n')


def fetch_one(url, expected, folder, config):
    """Fetches a picture into the folder. -> its line of the manifest, with the reason why there is none"""
    entry = dict(url=url, file=file_name(url), sha256=None, reason='')
    try:
        data = get(url, config)
        entry['sha256'] = hashlib.sha256(data).hexdigest()
        entry['reason'] = wrong_sum(entry['sha256'], expected)
        if entry['reason']:
            return entry
        rgb_picture(data)
    except (Failed, ValueError) as e:
        entry['reason'] = str(e)
        return entry
    partial_file = folder / f'.{file_name(url)}.partial'
    partial_file.write_bytes(data)
    partial_file.replace(folder / file_name(url))
    return entry


def wrong_sum(sha256, expected):
    """Why a file with this sha256 is not the one that the data set means, or ''."""
    if sha256 and expected and sha256 != expected.lower():
        return 'another picture than it was (sha256)'
    return ''


class Failed(Exception):
    """Why a URL gave no picture; `again`: seconds after which it may be tried again, or None."""

    def __init__(self, reason, again=None):
        super().__init__(reason)
        self.again = again


def get(url, config):
    """The body of a URL; tries again, with longer and longer pauses, where that may help. Raises: Failed."""
    for attempt in range(config.retries + 1):
        try:
            return get_once(url, config)
        except Failed as e:
            if e.again is None or attempt == config.retries:
                raise
            time.sleep(min(30, max(e.again, config.backoff_s * 2**attempt)))


def get_once(url, config):
    deadline = time.time() + config.timeout_s
    try:
        return body(url, config, deadline)
    except KeyError:
        raise Failed('neither http nor https') from None
    except ssl.SSLCertVerificationError as e:
        raise Failed(f'no valid certificate: {e.verify_message}') from None
    except (ValueError, http.client.InvalidURL):
        raise Failed('not a URL') from None
    except (OSError, http.client.HTTPException) as e:
        if isinstance(e, TimeoutError) or time.time() > deadline:
            reason = 'timed out'
        elif isinstance(e, http.client.IncompleteRead):
            reason = 'cut off'
        elif isinstance(e, OSError):
            reason = 'no connection'
        else:
            reason = 'not HTTP'
        raise Failed(reason, again=0) from None


def body(url, config, deadline, most_redirects=5):
    """One attempt, over before the deadline (but for the look-up of a name) whatever the server does: a timer
    hangs up on those that drip."""
    for _ in range(most_redirects + 1):
        parts = urlsplit(url)
        port = parts.port or {'http': 80, 'https': 443}[parts.scheme]
        connection = connect(parts, port, config, deadline)
        watch = threading.Timer(max(0, deadline - time.time()), hang_up, [connection.sock])
        watch.daemon = True
        watch.start()
        try:
            if parts.scheme == 'https':
                connection.sock.do_handshake()
            target = parts.path or '/'
            if parts.query:
                target += f'?{parts.query}'
            headers = {'User-Agent': 'nano-trm-vlm', 'Accept': 'image/*'}
            connection.request('GET', quote(target, safe=KEPT), headers=headers)
            response = connection.getresponse()
            if response.status not in (301, 302, 303, 307, 308):
                return picture_bytes(response, config, deadline)
            place = (response.getheader('Location') or '').encode('latin-1')
            url = urljoin(url, quote(place, safe=KEPT))
        finally:
            watch.cancel()
            connection.close()
    raise Failed(f'more than {most_redirects} redirects')


def picture_bytes(response, config, deadline):
    """The body of an answer that is no redirect. Raises: Failed, TimeoutError, IncompleteRead."""
    if response.status == 429 or response.status >= 500:  # it may be better later
        after = response.getheader('Retry-After') or ''
        raise Failed(f'status {response.status}', again=float(after) if after.isdecimal() else 0)
    if response.status != 200:
        raise Failed(f'status {response.status}')
    data = bytearray()
    while block := response.read1(2**16):
        data += block
        if len(data) > config.most_bytes:
            raise Failed(f'more than {config.most_bytes} bytes')
    if time.time() > deadline:  # the timer hung up: this may be a part
        raise TimeoutError
    if response.length:  # bytes that were promised and did not come
        raise http.client.IncompleteRead(b'')
    return bytes(data)


def hang_up(sock):
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        pass


def connect(parts, port, config, deadline):
    """A connection to the host of a URL, whose address was looked up once and is public; the handshake of
    https is still to come."""
    if not parts.hostname:
        raise ValueError('no host')
    address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4]
    ip = ipaddress.ip_address(address[0].split('%')[0])
    ip = getattr(ip, 'ipv4_mapped', None) or ip  # ::ffff:127.0.0.1 is 127.0.0.1
    if not config.allow_private and not ip.is_global:
        raise Failed('a private address')
    left = deadline - time.time()
    if left <= 0:
        raise TimeoutError
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = socket.create_connection(address[:2], left)
    if parts.scheme == 'https':
        secure = ssl.create_default_context()
        connection.sock = secure.wrap_socket(connection.sock, server_hostname=parts.hostname,
                                             do_handshake_on_connect=False)
    return connection
