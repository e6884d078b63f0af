//! What a run may touch: nothing of the working directory is executed or loaded, nothing unknown is installed, nothing
//! is written outside of the output and the caches, and an end that is asked for comes while somebody else is waited for.
#![cfg(unix)]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::models::runtime;
use common::{TestResult, copy_kjv_llama, scratch};
use hf2onnx::runtime::{PINNED_VERSION, Search};
use serde_json::Value;

/// Long enough for any run here; a run that never ends fails its test.
const PATIENCE: Duration = Duration::from_secs(20);

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A home of its own, a folder for temporary files, and a repository to stand in.
    fn new() -> TestResult<Self> {
        let place = Self { dir: tempfile::tempdir_in(scratch())? };
        for folder in ["home", "tmp", "repo", "marks", "wheels", "bin", "out"] {
            fs::create_dir(place.path(folder))?;
        }
        copy_kjv_llama(&place.path("repo"))?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program in the repository, with nothing of the user's.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
        command.args(words).current_dir(self.path("repo")).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.path("home")).env("TMPDIR", self.path("tmp"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn marks(&self) -> TestResult<Vec<String>> {
        let entries = fs::read_dir(self.path("marks"))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    /// Every file below, but those of some folders.
    fn files(&self, but: &[&str]) -> TestResult<Vec<PathBuf>> {
        let (mut files, mut folders) = (Vec::new(), vec![self.dir.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let known = but.iter().any(|name| path == self.path(name));
                match path.is_dir() {
                    _ if known => {}
                    true => folders.push(path),
                    false => files.push(path),
                }
            }
        }
        Ok(files)
    }

    /// Makes the repository hostile: whatever of it is run or imported leaves a mark.
    fn poison(&self) -> TestResult {
        let repo = self.path("repo");
        let mark = |name: &str| self.path("marks").join(name.replace('/', "_"));
        for module in [
            "pip.py",
            "pip/__init__.py",
            "pip/__main__.py",
            "sitecustomize.py",
            "usercustomize.py",
            "site.py",
            "encodings.py",
            "importlib.py",
            "sys.py",
            "onnxruntime/__init__.py",
            "onnxruntime/capi/__init__.py",
            "nvidia/__init__.py",
            "ensurepip.py",
            "modeling_llama.py",
            "configuration_llama.py",
        ] {
            let path = repo.join(module);
            fs::create_dir_all(path.parent().ok_or("no parent")?)?;
            fs::write(&path, format!("open('{}', 'w').close()\n", mark(module).display()))?;
        }
        // pip asks the last three who they are.
        for program in ["python3", "python", "py", "pip3", "nvidia-smi", "rustc", "lsb_release", "uname"] {
            let body = format!("touch '{}'", mark(program).display());
            for folder in ["", "bin"] {
                fs::create_dir_all(repo.join(folder))?;
                script(&repo.join(folder).join(program), &body)?;
            }
        }
        for library in ["libonnxruntime.so", "libonnxruntime.so.1.32.0", "libonnxruntime.dylib", "libcudart.so.13"] {
            for folder in ["", "onnxruntime/capi", "lib", "onnxruntime-1.32.0"] {
                fs::create_dir_all(repo.join(folder))?;
                fs::write(repo.join(folder).join(library), "not a library")?;
            }
        }
        fs::write(repo.join("pyvenv.cfg"), "home = .\ninclude-system-site-packages = false\n")?;
        fs::write(repo.join("pip.conf"), "[global]\nindex-url = http://127.0.0.1:1/\n")?;
        Ok(())
    }

    /// The command with a path and variables that lead into the working directory.
    fn misled(&self, words: &[&str]) -> Command {
        let mut command = self.command(words);
        let repo = self.path("repo");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders =
            [Path::new("."), Path::new(""), Path::new("bin"), &repo, &repo.join("bin")].map(Path::to_path_buf);
        let folders = folders.into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders).unwrap_or_default());
        for name in ["PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"] {
            command.env(name, if name == "PYTHONPATH" { ":." } else { "." });
        }
        command.env("PYTHONSTARTUP", "sitecustomize.py").env("CUDA_PATH", ".");
        // Nothing is fetched: pip finds what lies in the folder, or nothing.
        command.env("PIP_NO_INDEX", "1").env("PIP_FIND_LINKS", self.path("wheels"));
        command
    }
}

/// Writes a program.
fn script(path: &Path, body: &str) -> TestResult {
    fs::write(path, format!("#!/bin/sh\n{body}\n"))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn said(ran: &Output) -> String {
    format!("{}: {}{}", ran.status, String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

fn wait(child: Child) -> TestResult<Output> {
    let id = child.id().to_string();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    if let Ok(ran) = receiver.recv_timeout(PATIENCE) {
        return Ok(ran?);
    }
    Command::new("kill").args(["-s", "KILL", &id]).status()?;
    Err("it did not end".into())
}

#[test]
fn nothing_of_the_working_directory_runs() -> TestResult {
    let place = Place::new()?;
    place.poison()?;
    let output = place.path("out").join("model");
    let build = ["build", ".", "--verify", "--output", output.to_str().ok_or("no UTF-8")?];
    // Whether the machine has an onnxruntime of its own or not.
    let built = place.misled(&build).output()?;
    assert!(built.status.success() || said(&built).contains("error[runtime-missing]"), "{}", said(&built));
    for words in [
        &["runtime"][..],
        &["runtime", "install"],
        &["runtime", "--provider", "cuda"],
        &["inspect", "."],
        &["--json", "runtime"],
    ] {
        let ran = place.misled(words).output()?;
        assert!(!said(&ran).contains("not a library"), "{words:?}: {}", said(&ran));
        assert_eq!(place.marks()?, [""; 0], "{words:?}: {}", said(&ran));
    }
    // The marks would be seen: this is what the working directory does to who stands in it.
    let ran = Command::new("python3").args(["-c", "import pip"]).current_dir(place.path("repo")).output();
    assert!(ran.is_err() || !place.marks()?.is_empty(), "python3 imports nothing of its working directory");
    Ok(())
}

#[test]
fn a_library_below_the_working_directory_is_said_to_be_passed_over() -> TestResult {
    let place = Place::new()?;
    place.poison()?;
    let mut command = place.command(&["--json", "runtime"]);
    command.env("LD_LIBRARY_PATH", place.path("repo").join("lib"));
    command.env("DYLD_LIBRARY_PATH", place.path("repo").join("lib"));
    let text = said(&command.output()?);
    assert!(text.contains("below the working directory") && text.contains("--runtime"), "{text}");
    Ok(())
}

/// A wheel of this name that pip takes, whose library is anybody's.
fn wheel(folder: &Path, name: &str) -> TestResult {
    let mut zip = zip::ZipWriter::new(fs::File::create(folder.join(name))?);
    let plain = zip::write::SimpleFileOptions::default();
    let info = format!("onnxruntime-{PINNED_VERSION}.dist-info");
    let tag = name.trim_end_matches(".whl").splitn(3, '-').nth(2).ok_or("no tag")?;
    let library = format!("onnxruntime/capi/libonnxruntime.so.{PINNED_VERSION}");
    for (path, text) in [
        (library.clone(), "anybody's".to_owned()),
        (format!("{info}/METADATA"), format!("Metadata-Version: 2.1\nName: onnxruntime\nVersion: {PINNED_VERSION}\n")),
        (format!("{info}/WHEEL"), format!("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")),
        (format!("{info}/RECORD"), format!("{library},sha256=VAvm2a2n6mFSLcW1YyT8Kk1ezcOY6Wv5ZSHJt3hkKyE,9\n")),
    ] {
        zip.start_file(path, plain)?;
        zip.write_all(text.as_bytes())?;
    }
    zip.finish()?;
    Ok(())
}

#[test]
fn a_wheel_that_is_not_known_is_refused_by_name() -> TestResult {
    let platform = format!("manylinux_2_28_{}", std::env::consts::ARCH);
    for tag in ["py3-none-any".to_owned(), format!("cp312-cp312-{platform}")] {
        if cfg!(not(target_os = "linux")) && tag.contains("linux") {
            continue;
        }
        let place = Place::new()?;
        let name = format!("onnxruntime-{PINNED_VERSION}-{tag}.whl");
        wheel(&place.path("wheels"), &name)?;
        let ran = place.misled(&["runtime", "install"]).output()?;
        let text = said(&ran);
        assert!(text.contains("error[runtime-missing]") && text.contains(&name), "{text}");
        assert!(text.contains("sha256") && text.contains("not unpacked") && text.contains("--runtime"), "{text}");
        assert_eq!(ran.status.code(), Some(1));
        // pip asks rustc for its version, which may be rustup's and then makes itself at home.
        let left = place.files(&["repo", "wheels", "marks", "home/.rustup"])?;
        assert!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

#[test]
fn a_run_writes_only_its_output_and_its_caches() -> TestResult {
    runtime()?;
    let library = Search::default().run().library().ok_or("no onnxruntime")?.path;
    let place = Place::new()?;
    let output = place.path("out").join("model");
    let output = output.to_str().ok_or("no UTF-8")?;
    let repo = place.path("repo");
    let repo = repo.to_str().ok_or("no UTF-8")?;
    let runs = [
        &["build", repo, "--output", output, "--verify"][..],
        &["generate", output, "--prompt", "In the", "--max-new-tokens", "2"],
        &["bench", output, "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1", "--loads", "1"],
        &["verify", output, "--golden", repo],
        &["runtime"],
    ];
    for words in runs {
        // Neither the variable that this process was given, nor one that asks for the opposite.
        for telemetry in [None, Some("0")] {
            let mut command = place.command(words);
            command.current_dir(place.path("out")).env("ORT_DYLIB_PATH", &library);
            command.envs(telemetry.map(|value| ("ORT_DISABLE_TELEMETRY", value)));
            if words[0] == "build" && Path::new(output).exists() {
                command.arg("--force");
            }
            let ran = command.output()?;
            assert!(ran.status.success(), "{words:?}: {}", said(&ran));
            let left = place.files(&["repo", "out/model"])?;
            assert!(left.is_empty(), "{words:?} left {left:?}");
        }
    }
    Ok(())
}

/// Asks a program for its end, as a service manager does.
fn terminate(child: &Child) -> TestResult {
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status()?.success());
    Ok(())
}

fn interrupted(ran: &Output) -> TestResult {
    assert_eq!(ran.status.code(), Some(130), "{}", said(ran));
    let text = String::from_utf8_lossy(&ran.stderr);
    let line = text.lines().find(|line| line.starts_with('{')).ok_or("no error in JSON")?;
    let error: Value = serde_json::from_str(line)?;
    assert_eq!(error.pointer("/error/code"), Some(&Value::from("interrupted")), "{error}");
    Ok(())
}

/// The server takes the request and never answers; it notices when the program has gone.
#[test]
fn a_request_to_end_while_a_server_says_nothing() -> TestResult {
    let place = Place::new()?;
    let server = TcpListener::bind("127.0.0.1:0")?;
    let output = place.path("out").join("model");
    let mut command = place.command(&["--json", "build", "org/name", "--output", output.to_str().ok_or("no UTF-8")?]);
    command.env("HF_ENDPOINT", format!("http://{}", server.local_addr()?));
    let child = command.spawn()?;
    let (mut stream, _) = server.accept()?;
    let mut request = [0; 16];
    stream.read_exact(&mut request)?;
    assert!(request.starts_with(b"GET /api/models/"));
    terminate(&child)?;
    interrupted(&wait(child)?)?;
    let left = place.files(&["repo"])?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

/// pip never ends: it is ended with the program, and what it was to install goes.
#[test]
fn a_request_to_end_while_a_program_runs() -> TestResult {
    let place = Place::new()?;
    let pid = place.path("marks").join("pid");
    let wait_for_ever = format!(
        "[ \"$1$3\" = -I-m ] || exit 1\necho $$ > '{0}.new'; mv '{0}.new' '{0}'\nexec sleep 600",
        pid.display()
    );
    script(&place.path("bin").join("python3"), &wait_for_ever)?;
    let mut command = place.command(&["--json", "runtime", "install"]);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(place.path("bin")).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(folders)?);
    let child = command.spawn()?;
    while !pid.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    terminate(&child)?;
    interrupted(&wait(child)?)?;
    let pid = fs::read_to_string(&pid)?;
    let alive = Command::new("kill").args(["-s", "0", pid.trim()]).stderr(Stdio::null()).status()?;
    assert!(!alive.success(), "pip lives");
    let left = place.files(&["repo", "marks", "bin"])?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}
