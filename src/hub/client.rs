//! What is asked of the hub: what a revision holds, and a file from some byte on.

use std::io::Read as _;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::Settings;
use super::id::{Id, is_commit};
use super::pace::Pace;
use super::select::is_plain;
use crate::error::{Code, Error, Result};

/// The hub itself needs two: to a renamed model, and to the store of large files.
const REDIRECTS: usize = 8;
/// Bytes of the answer that lists a repository's files.
const LARGEST_LIST: u64 = 100_000_000;

/// Why a request brought nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may succeed when it is made again.
    Passing(String),
    /// It will not.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// A revision of a model.
#[derive(Debug)]
pub(crate) struct Revision {
    /// The commit that it is.
    pub(crate) commit: String,
    /// Its files.
    pub(crate) files: Vec<Listed>,
}

/// A file as the hub lists it; mirrors may leave out everything but its name.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) name: String,
    known: Option<(u64, String, Check)>,
}

/// A file that can be fetched.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    pub(crate) name: String,
    /// Bytes.
    pub(crate) size: u64,
    /// The blob's name in the cache.
    pub(crate) etag: String,
    pub(crate) check: Check,
}

/// What the hub says about a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Check {
    /// Large files: SHA-256 of the content.
    Sha256(String),
    /// Small files: git's hash of the content behind a line with its size.
    Git(String),
    /// Nothing but the size.
    Size,
}

/// The body of a file.
pub(crate) struct Stream {
    /// Byte that it starts at.
    pub(crate) start: u64,
    pub(crate) body: Body,
}

/// Speaks with the hub about one model.
pub(crate) struct Client<'a> {
    pub(crate) id: &'a Id,
    settings: &'a Settings,
    endpoint: Uri,
    agent: Agent,
}

#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl<'a> Client<'a> {
    pub(crate) fn new(id: &'a Id, settings: &'a Settings) -> Result<Self> {
        let endpoint =
            settings.endpoint.parse::<Uri>().ok().filter(|uri| uri.scheme().is_some() && uri.host().is_some());
        let endpoint = endpoint.ok_or_else(|| {
            Error::new(Code::UsageInvalid, "HF_ENDPOINT").found(&settings.endpoint).expected("https://host")
        })?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where it is known whom the token is for.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("hf2onnx/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(settings.silence))
            .timeout_recv_response(Some(settings.silence))
            .timeout_per_read(Some(settings.silence))
            .build()
            .into();
        Ok(Self { id, settings, endpoint, agent })
    }

    /// What the revision holds.
    pub(crate) fn revision(&self) -> Result<Revision, Failure> {
        let revision = percent_encoded(self.id.revision(), "");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.settings.endpoint, self.id.name());
        let answer = self.ask(false, &url, 0)?;
        self.accept(None, &answer)?;
        let bytes = self.all(answer.response.into_body())?;
        let info: ModelInfo = serde_json::from_slice(&bytes).map_err(|error| self.strange(&url, &error.to_string()))?;
        if !is_commit(&info.sha) {
            return Err(self.strange(&url, "`sha` that is no commit").into());
        }
        let files = info.siblings.into_iter().filter(|sibling| is_plain(&sibling.rfilename)).map(Sibling::listed);
        Ok(Revision { commit: info.sha, files: files.collect() })
    }

    /// The whole of a small answer.
    fn all(&self, body: Body) -> Result<Vec<u8>, Failure> {
        let (mut reader, mut pace) = (body.into_reader().take(LARGEST_LIST), Pace::new(&self.settings.clock));
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            crate::interrupt::check()?;
            let count = reader.read(&mut buffer).map_err(|error| Failure::Passing(error.to_string()))?;
            if count == 0 {
                return Ok(bytes);
            }
            bytes.extend(buffer.iter().take(count));
            pace.advance(count as u64).map_err(Failure::Passing)?;
        }
    }

    /// Size and hash of a listed file: the list's, or else what the file's own headers say.
    pub(crate) fn remote(&self, commit: &str, file: &Listed) -> Result<Remote, Failure> {
        let (size, etag, check) = match file.known.clone() {
            Some(known) => known,
            None => self.head(commit, &file.name)?,
        };
        Ok(Remote { name: file.name.clone(), size, etag, check })
    }

    fn head(&self, commit: &str, name: &str) -> Result<(u64, String, Check), Failure> {
        let url = self.file_url(commit, name);
        let answer = self.ask(true, &url, 0)?;
        if !answer.response.status().is_redirection() {
            self.accept(Some(name), &answer)?;
        }
        let headers = answer.response.headers();
        let either = |first: &str, second: &str| text(headers, first).or_else(|| text(headers, second));
        let size = either("x-linked-size", "content-length").and_then(|size| size.parse().ok());
        let etag =
            either("x-linked-etag", "etag").map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        match (size, etag.filter(|etag| is_file_name(etag))) {
            (Some(size), Some(etag)) => {
                let check = if is_sha256(&etag) { Check::Sha256(etag.clone()) } else { Check::Size };
                Ok((size, etag, check))
            }
            _ => Err(self.strange(&url, "no usable ETag and size").into()),
        }
    }

    /// A file's content from byte `from` on, or from 0 if the server knows no ranges.
    pub(crate) fn stream(&self, commit: &str, name: &str, from: u64) -> Result<Stream, Failure> {
        let answer = self.ask(false, &self.file_url(commit, name), from)?;
        if answer.response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return if from > 0 {
                self.stream(commit, name, 0)
            } else {
                Err(Failure::Passing("status 416".to_owned()))
            };
        }
        self.accept(Some(name), &answer)?;
        let partial = answer.response.status() == StatusCode::PARTIAL_CONTENT;
        let range = text(answer.response.headers(), header::CONTENT_RANGE.as_str());
        let start = if partial { range.as_deref().and_then(range_start) } else { Some(0) };
        match start.filter(|start| *start == 0 || *start == from) {
            Some(start) => Ok(Stream { start, body: answer.response.into_body() }),
            None => Err(Failure::Passing("a range that was not asked for".to_owned())),
        }
    }

    fn file_url(&self, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.id.name(), percent_encoded(name, "/"))
    }

    /// Makes a request and follows its redirects. A HEAD stops at the host that knows the hash.
    fn ask(&self, head: bool, url: &str, from: u64) -> Result<Answer, Failure> {
        let mut url: Uri = url.parse().map_err(|_| self.strange(url, "an address that is none"))?;
        for _ in 0..REDIRECTS {
            let own = self.is_own(&url);
            let mut request = if head { self.agent.head(&url) } else { self.agent.get(&url) };
            if let Some(token) = self.settings.token.as_ref().filter(|_| own) {
                // Marked, so that nothing that prints a request prints it.
                let value = header::HeaderValue::try_from(format!("Bearer {token}")).map(|mut value| {
                    value.set_sensitive(true);
                    value
                });
                let value = value.map_err(|_| {
                    Error::new(Code::UsageInvalid, "HF_TOKEN")
                        .found("a token with characters that no token has")
                        .help("copy it again from the hub's settings page")
                })?;
                request = request.header(header::AUTHORIZATION, value);
            }
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(&error))?;
            let onward =
                text(response.headers(), header::LOCATION.as_str()).filter(|_| response.status().is_redirection());
            let known = head && response.headers().contains_key("x-linked-etag");
            match onward.filter(|_| !known) {
                None => return Ok(Answer { response, own }),
                Some(onward) => {
                    url = resolved(&url, &onward).ok_or_else(|| self.strange(&onward, "an address that is none"))?;
                }
            }
        }
        Err(self.strange(&url.to_string(), "one redirect after the other").into())
    }

    /// True if the token may be sent there.
    fn is_own(&self, url: &Uri) -> bool {
        (url.scheme(), url.authority()) == (self.endpoint.scheme(), self.endpoint.authority())
    }

    /// Fails unless the answer is what was asked for.
    fn accept(&self, file: Option<&str>, answer: &Answer) -> Result<(), Failure> {
        let status = answer.response.status();
        let again = status.is_server_error()
            || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status)
            // A signed address that has expired: the hub gives a new one.
            || (!answer.own && [StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED].contains(&status));
        if status.is_success() {
            Ok(())
        } else if again {
            Err(Failure::Passing(format!("status {status}")))
        } else {
            Err(self.refused(file, status, answer.response.headers()).into())
        }
    }

    fn refused(&self, file: Option<&str>, status: StatusCode, headers: &HeaderMap) -> Error {
        let (token, page) = (self.settings.token.is_some(), format!("{}/{}", self.settings.endpoint, self.id.name()));
        let subject = file.map_or_else(|| self.id.to_string(), |file| format!("{}: {file}", self.id));
        let with = if token { "with this token" } else { "without a token" };
        let give = if token { "give a token of an account that has access" } else { "give a token" };
        let login = "`hf auth login`, or HF_TOKEN";
        let kind = text(headers, "x-error-code").unwrap_or_default();
        let said = text(headers, "x-error-message").map(|text| text.chars().take(300).collect::<String>());
        let said = said.map_or_else(String::new, |said| format!(": {}", said.escape_debug()));
        let missing = |what: &str| Error::new(Code::HubNotFound, &subject).found(format!("{what} (status {status})"));
        let denied =
            |what: &str| Error::new(Code::HubDenied, &subject).found(format!("{what} (status {status}){said}"));
        match (kind.as_str(), status.as_u16()) {
            ("GatedRepo", _) => denied("a gated model")
                .expected("an account that accepted its conditions")
                .help(format!("accept them at {page}, then {give} ({login})")),
            ("RevisionNotFound", _) => missing("no such revision")
                .expected("a branch, tag or full commit hash")
                .help(format!("look at {page}/tree/main for those there are")),
            ("EntryNotFound", _) => missing("no such file at the revision").help(format!("look at {page}/tree/main")),
            ("RepoNotFound", _) | (_, 404) => missing(&format!("no such directory, and no such model {with}"))
                .expected("a directory, or a model of the hub")
                .help(format!("check the spelling at {page}; for a private model {give} ({login})")),
            (_, 401 | 403) => denied(&format!("access refused {with}"))
                .expected("a public model, or a token that may read it")
                .help(format!("check the spelling at {page}, and {give} ({login})")),
            _ => Error::new(Code::HubUnreachable, &subject)
                .found(format!("status {status}{said}"))
                .help(format!("try {page}")),
        }
    }

    /// An error of transport. Most pass; a name that does not resolve or a certificate that does not hold stay.
    fn unreachable(&self, error: &ureq::Error) -> Failure {
        let stays = match error {
            ureq::Error::HostNotFound | ureq::Error::Tls(_) | ureq::Error::Rustls(_) => true,
            // As rustls says it within a stream.
            ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::InvalidData,
            _ => false,
        };
        if stays { self.gave_up(&error.to_string()).into() } else { Failure::Passing(error.to_string()) }
    }

    /// The error after the last attempt.
    pub(crate) fn gave_up(&self, found: &str) -> Error {
        Error::new(Code::HubUnreachable, self.id)
            .found(format!("{}: {found}", self.settings.endpoint))
            .expected("the hub, or a complete snapshot in the cache")
            .help(format!(
                "check the network and run again: what is downloaded is kept; a mirror is named by HF_ENDPOINT. Or \
                 `hf download {}` elsewhere, and give the directory",
                self.id.download_arguments()
            ))
    }

    fn strange(&self, url: &str, found: &str) -> Error {
        Error::new(Code::HubUnreachable, self.id)
            .found(format!("{}: {found}", url.escape_debug()))
            .expected("an answer as the Hugging Face hub gives it")
            .help("check HF_ENDPOINT")
    }
}

struct Answer {
    response: Response<Body>,
    /// It came from the endpoint, not from where that led.
    own: bool,
}

impl Sibling {
    fn listed(self) -> Listed {
        let known = match (self.lfs, self.blob_id, self.size) {
            (Some(lfs), _, _) if is_sha256(&lfs.sha256) => {
                Some((lfs.size, lfs.sha256.clone(), Check::Sha256(lfs.sha256)))
            }
            (None, Some(blob), Some(size)) if is_commit(&blob) => Some((size, blob.clone(), Check::Git(blob))),
            _ => None,
        };
        Listed { name: self.rfilename, known }
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// An etag becomes a file's name.
fn is_file_name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    (1..=128).contains(&text.len()) && text.chars().all(inner) && !text.starts_with('.') && !text.ends_with('.')
}

/// The first byte of `bytes 5-9/10`.
fn range_start(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

/// Every byte but letters, digits, `-_.~` and those of `keep`, as `%` and two digits.
fn percent_encoded(text: &str, keep: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut url, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keep.as_bytes().contains(&byte) {
            url.push(char::from(byte));
        } else {
            // Writing to a String can not fail.
            let _ = write!(url, "%{byte:02X}");
        }
        url
    })
}

/// Where a redirect leads: to an address, or to a path on the same host.
fn resolved(from: &Uri, to: &str) -> Option<Uri> {
    let there: Uri = to.parse().ok()?;
    if there.scheme().is_some() {
        return Some(there);
    }
    let path = to.starts_with('/').then_some(to)?;
    Uri::builder().scheme(from.scheme()?.clone()).authority(from.authority()?.clone()).path_and_query(path).build().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(percent_encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(percent_encoded("a b/é", "/"), "a%20b/%C3%A9");
        let from: Uri = "https://hub:1/a/b?c".parse().unwrap();
        assert_eq!(resolved(&from, "/x?y=1").unwrap().to_string(), "https://hub:1/x?y=1");
        assert_eq!(resolved(&from, "http://other/x").unwrap().to_string(), "http://other/x");
        assert!(resolved(&from, "x y").is_none());
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("bytes */10"), None);
    }

    #[test]
    fn hostile_etags_are_no_file_names() {
        assert!(is_file_name("0123abc-9"));
        for etag in ["", "..", "a/b", "a\\b", ".x", "a:b", "a."] {
            assert!(!is_file_name(etag), "{etag}");
        }
    }
}
