//! A server that speaks as much of the hub's API as is used, with failures on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::TestResult;

/// The commit of every revision.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server holds, and how it misbehaves.
#[derive(Debug, Default)]
pub struct Model {
    /// `org/name`.
    pub id: String,
    /// Content of each file.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The lists say no size and no hash, as those of some mirrors do.
    pub bare: bool,
    /// Only who has this token sees the model.
    pub token: Option<String>,
    /// Files are shown only to those who accepted conditions.
    pub gated: bool,
    /// A former name of the model.
    pub former: Option<String>,
    /// The next answers with this file close after so many bytes.
    pub cut: BTreeMap<String, Vec<usize>>,
    /// The next so many answers with this file have one wrong byte.
    pub corrupt: BTreeMap<String, usize>,
    /// Files that are listed but not there.
    pub gone: BTreeSet<String>,
    /// The next so many requests are answered with status 503.
    pub busy: usize,
    /// Ranges are not known here.
    pub no_ranges: bool,
    /// Answers whose path ends with this come byte by byte.
    pub trickle: Option<String>,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// `hub` or `store`.
    pub host: &'static str,
    /// GET or HEAD.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// The header `Authorization`.
    pub token: Option<String>,
}

/// Two servers: the hub, and the store of large files that it redirects to.
pub struct Hub {
    /// Address of the hub.
    pub endpoint: String,
    shared: Arc<Shared>,
}

struct Shared {
    model: Mutex<Model>,
    log: Mutex<Vec<Request>>,
    store: String,
}

impl Hub {
    /// Serves the files of a folder, but for those of folders in it.
    pub fn of_folder(id: &str, folder: &Path) -> TestResult<Self> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_file()) {
                files.insert(name.to_owned(), fs::read(&path)?);
            }
        }
        Self::serve(Model { id: id.to_owned(), files, ..Model::default() })
    }

    /// Starts both servers; they end with the test's process.
    pub fn serve(model: Model) -> TestResult<Self> {
        let (hub, store) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        let endpoint = format!("http://{}", hub.local_addr()?);
        let store_address = format!("http://{}", store.local_addr()?);
        let shared = Arc::new(Shared { model: Mutex::new(model), log: Mutex::default(), store: store_address });
        for (host, listener) in [("hub", hub), ("store", store)] {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = Arc::clone(&shared);
                    // A client that hangs up is part of some tests.
                    std::thread::spawn(move || shared.answer(host, stream).unwrap_or_default());
                }
            });
        }
        Ok(Self { endpoint, shared })
    }

    /// What the server holds; it may be changed between requests.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        lock(&self.shared.model)
    }

    /// All requests so far.
    pub fn log(&self) -> Vec<Request> {
        lock(&self.shared.log).clone()
    }

    /// Requests for a file's content, in order.
    pub fn gets(&self, file: &str) -> Vec<Request> {
        let wanted = |r: &Request| r.method == "GET" && r.path.ends_with(&format!("/{file}"));
        self.log().into_iter().filter(wanted).collect()
    }
}

/// A poisoned lock is as good as any: the test that broke it fails anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True if a path asks about the model of this name.
fn is_below(path: &str, id: &str) -> bool {
    path.strip_prefix("/api/models").unwrap_or(path).starts_with(&format!("/{id}/"))
}

/// Large files lie in the store, under their SHA-256.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn etag(name: &str, bytes: &[u8]) -> String {
    if is_large(name) {
        return format!("{:x}", Sha256::digest(bytes));
    }
    format!("{:x}", Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

impl Model {
    fn list(&self) -> Value {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let (size, hash) = (bytes.len(), etag(name, bytes));
            match (self.bare, is_large(name)) {
                (true, _) => json!({ "rfilename": name }),
                (false, true) => json!({ "rfilename": name, "size": size, "blobId": "0".repeat(40),
                    "lfs": { "sha256": hash, "size": size, "pointerSize": 134 } }),
                (false, false) => json!({ "rfilename": name, "size": size, "blobId": hash }),
            }
        };
        json!({ "id": self.id, "sha": COMMIT, "siblings": self.files.iter().map(sibling).collect::<Vec<_>>() })
    }

    /// Status and error code for a request that is not allowed.
    fn refusal(&self, token: Option<&str>) -> Option<(u16, &'static str)> {
        let wanted = self.token.as_ref().map(|token| format!("Bearer {token}"));
        (wanted.is_some() && wanted.as_deref() != token).then_some((401, "RepoNotFound"))
    }
}

/// An answer before it is written.
#[derive(Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Close after so many bytes of the body.
    cut: Option<usize>,
}

fn error(status: u16, code: &str) -> Answer {
    let headers = vec![("X-Error-Code", code.to_owned()), ("X-Error-Message", format!("the server says {code}"))];
    Answer { status, headers, ..Answer::default() }
}

impl Shared {
    fn answer(&self, host: &'static str, mut stream: TcpStream) -> TestResult {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().ok_or("no request")??;
        let mut words = first.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut request = Request { host, method, path, range: None, token: None };
        for line in lines {
            let line = line?;
            match line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())) {
                Some((name, value)) if name == "range" => request.range = Some(value),
                Some((name, value)) if name == "authorization" => request.token = Some(value),
                None => break,
                _ => {}
            }
        }
        lock(&self.log).push(request.clone());
        let answer = self.route(&request);
        write!(
            stream,
            "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
            answer.status,
            answer.body.len()
        )?;
        for (name, value) in &answer.headers {
            write!(stream, "{name}: {value}\r\n")?;
        }
        stream.write_all(b"\r\n")?;
        if request.method != "HEAD" {
            let end = answer.cut.unwrap_or(answer.body.len()).min(answer.body.len());
            let body = answer.body.get(..end).unwrap_or_default();
            let path = request.path.split('?').next().unwrap_or_default();
            let slow = lock(&self.model).trickle.as_ref().is_some_and(|end| path.ends_with(end.as_str()));
            for byte in body.chunks(if slow { 1 } else { body.len().max(1) }) {
                stream.write_all(byte)?;
                if slow {
                    // So that the next byte is read for itself.
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
        Ok(())
    }

    fn route(&self, request: &Request) -> Answer {
        let mut model = lock(&self.model);
        if model.busy > 0 {
            model.busy -= 1;
            return error(503, "");
        }
        let path = request.path.split('?').next().unwrap_or_default();
        if let Some(name) = path.strip_prefix("/store/").filter(|_| request.host == "store") {
            return content(&mut model, name, request);
        }
        if let Some(former) = model.former.as_ref().filter(|former| is_below(path, former)) {
            let there = request.path.replacen(former.as_str(), &model.id, 1);
            return Answer { status: 307, headers: vec![("Location", there)], ..Answer::default() };
        }
        if let Some((status, code)) = model.refusal(request.token.as_deref()) {
            return error(status, code);
        }
        if let Some(revision) = path.strip_prefix(&format!("/api/models/{}/revision/", model.id)) {
            if !["main", "v1", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
                return error(404, "RevisionNotFound");
            }
            return Answer { status: 200, body: model.list().to_string().into_bytes(), ..Answer::default() };
        }
        match path.strip_prefix(&format!("/{}/resolve/{COMMIT}/", model.id)) {
            Some(name) => self.file(&mut model, name, request),
            None => error(404, "RepoNotFound"),
        }
    }

    fn file(&self, model: &mut Model, name: &str, request: &Request) -> Answer {
        let Some(bytes) = model.files.get(name).filter(|_| !model.gone.contains(name)) else {
            return error(404, "EntryNotFound");
        };
        if model.gated {
            return error(403, "GatedRepo");
        }
        let commit = ("X-Repo-Commit", COMMIT.to_owned());
        if is_large(name) {
            let (hash, size) = (etag(name, bytes), bytes.len());
            let linked = [("X-Linked-Etag", format!("\"{hash}\"")), ("X-Linked-Size", size.to_string())];
            let there = ("Location", format!("{}/store/{name}", self.store));
            return Answer {
                status: 302,
                headers: [commit, there].into_iter().chain(linked).collect(),
                ..Answer::default()
            };
        }
        let tag = ("ETag", format!("W/\"{}\"", etag(name, bytes)));
        let mut answer = content(model, name, request);
        answer.headers.extend([commit, tag]);
        answer
    }
}

fn content(model: &mut Model, name: &str, request: &Request) -> Answer {
    let Some(mut bytes) = model.files.get(name).cloned() else { return error(404, "EntryNotFound") };
    let all = bytes.len();
    let (mut status, mut headers, get) = (200, Vec::new(), request.method == "GET");
    if let Some(times) = model.corrupt.get_mut(name).filter(|times| get && **times > 0) {
        *times -= 1;
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
    }
    let from =
        request.range.as_ref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    if let Some(from) = from.filter(|_| !model.no_ranges) {
        if from >= all {
            return error(416, "");
        }
        status = 206;
        headers.push(("Content-Range", format!("bytes {from}-{}/{all}", all - 1)));
        bytes.drain(..from);
    }
    let cuts = model.cut.get_mut(name).filter(|cuts| get && !cuts.is_empty());
    Answer { status, headers, body: bytes, cut: cuts.map(|cuts| cuts.remove(0)) }
}
