//! `hf2onnx quant-report`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{Output, RuntimeOption, repo};
use crate::bench;
use crate::build::Logits;
use crate::calibrate::{self, Text};
use crate::compile::{self, KvCache, Weights, compile};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::generate::config::GenerationConfig;
use crate::golden::Golden;
use crate::interrupt::{self, Ending};
use crate::lower::Padding;
use crate::opset::Target;
use crate::quant_report::{Calibration, Entry, Plan, Tokens, page, run};
use crate::quantize;
use crate::read::Adapter;
use crate::recipe::{Changes, Recipe};
use crate::session;
use crate::tokenizer::Tokenizer;
use crate::verify::scenario::Prompt;
use crate::verify::{WINDOW, Window, prompt_windows, text_windows};
use crate::write::{self, Force};

/// Compare ways to quantise a model: size, what it loses, and speed.
///
/// Builds the model in float32 and by each scheme, runs all of them over the same text, and measures their speeds in
/// turns. A scheme is a name that `build --quant` takes, and words after colons that change it: sym, asym, nearest,
/// search, f16 (scales), a block size, and calibrated, which takes --calibrate.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx quant-report golden/kjv-llama --html report.html\n  \
    hf2onnx quant-report REPO --schemes int4:nearest,int4,q4-mixed --text eval.txt --with other=out/other\n  \
    hf2onnx quant-report REPO --schemes q4,q4:calibrated,int4:f16:calibrated --calibrate text.txt")]
pub(super) struct QuantReport {
    /// A directory with config.json and safetensors files, or a model of the Hugging Face hub: org/name[@revision]
    repo: PathBuf,
    /// Schemes, in the order of the report
    #[arg(long, value_name = "S,S", value_delimiter = ',', default_value = "q4,q4-mixed,int8")]
    schemes: Vec<String>,
    /// The text that the float build reads for calibrated schemes; where none is, each is compared with and without
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of that text to read at most
    #[arg(long, value_name = "N", requires = "calibrate", default_value_t = calibrate::TOKENS)]
    calibrate_tokens: usize,
    /// A directory built elsewhere, compared too (repeatable)
    #[arg(long, value_name = "NAME=DIR")]
    with: Vec<String>,
    /// The text to compare on [default: that of the repository's golden, or the golden's rows]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// At most so many tokens of it
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Write the report as a page that needs no network
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Build into this directory and leave the builds there [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Which operators the graphs are made of
    #[arg(long, default_value = "ort-cpu", value_parser = target)]
    target: &'static Target,
    /// Describe the model by this template instead of a built-in one
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Take the weights as they are where an adapter lies beside them
    #[arg(long)]
    ignore_adapter: bool,
    /// A key of config.json that may stay unread (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_key: Vec<String>,
    /// A tensor that may stay unread, or a pattern with `*` (repeatable)
    #[arg(long, value_name = "NAME")]
    allow_unused_tensor: Vec<String>,
    /// Tokens of the prompt whose speed is measured
    #[arg(long, value_name = "N", default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens decoded after it
    #[arg(long, value_name = "N", default_value_t = 32)]
    new_tokens: usize,
    /// Rounds in which speed is measured; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    /// Threads within an operator [default: as many as cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    #[command(flatten)]
    runtime: RuntimeOption,
}

fn target(name: &str) -> Result<&'static Target, String> {
    Target::named(name).map_err(|e| e.expected)
}

impl QuantReport {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let schemes = self.schemes()?;
        let others = self.with.iter().map(|with| entry(with)).collect::<Result<Vec<_>>>()?;
        check_names(&schemes, &others)?;
        let repository = repo::directory(&self.repo, output)?;
        let tokens = self.tokens(&repository)?;
        let library = self.runtime.ensure(output)?;
        let place = Place::new(self.keep.as_deref())?;
        // Before anything is built: a text may be too short.
        let mut calibration = self.calibration(&repository, place.path())?;
        let reference = self.build(&Scheme::reference()?, &repository, &place, None, output)?;
        let mut entries = Vec::new();
        for scheme in &schemes {
            let known = calibration.as_mut().filter(|_| scheme.calibrated);
            entries.push(self.build(scheme, &repository, &place, known, output)?);
        }
        // The memory of what it found is for the sessions.
        drop(calibration);
        entries.extend(others);
        output.say("comparing");
        let plan = Plan { threads: self.threads, speed: (self.repeat > 0).then(|| self.speed()) };
        let report = run(self.model(), library.version, &reference, &entries, &tokens, &plan)?;
        if let Some(path) = &self.html {
            fs::write(path, page(&report)).map_err(|e| Error::io(path, &e))?;
        }
        if output.is_json() {
            return output.value(&report);
        }
        output.piece(&report.to_string());
        Ok(())
    }

    /// The schemes to build. Where a text is there and none of them asks for it, each comes with it and without.
    fn schemes(&self) -> Result<Vec<Scheme>> {
        let schemes = self.schemes.iter().map(|scheme| Scheme::parse(scheme)).collect::<Result<Vec<_>>>()?;
        let asking = schemes.iter().find(|scheme| scheme.calibrated);
        match (&self.calibrate, asking) {
            (None, Some(scheme)) => Err(Error::new(Code::UsageInvalid, "--schemes")
                .found(format!("`{CALIBRATED}` in `{}`, without --calibrate", scheme.name))
                .expected("a text for the float build to read")
                .help("give --calibrate FILE: some pages of the kind that the model will read")),
            (Some(_), None) => {
                if !schemes.iter().any(|scheme| scheme.recipe.quantises()) {
                    return Err(Error::new(Code::UsageInvalid, "--calibrate")
                        .found(format!("it beside {}, which round nothing", self.schemes.join(", ")))
                        .expected("a scheme that rounds, such as q4"));
                }
                let both = |scheme: Scheme| {
                    let other = scheme.recipe.quantises().then(|| scheme.with_calibration());
                    [Some(scheme), other].into_iter().flatten()
                };
                Ok(schemes.into_iter().flat_map(both).collect())
            }
            _ => Ok(schemes),
        }
    }

    /// The float build that shows what matrices are multiplied with, for all calibrated schemes.
    fn calibration(&self, repository: &Path, place: &Path) -> Result<Option<calibrate::Calibration>> {
        let Some(path) = self.calibrate.as_deref() else { return Ok(None) };
        let text = Text { path, tokens: self.calibrate_tokens };
        // Never put in its place: no scheme has that name.
        let float = place.join(CALIBRATED);
        calibrate::Calibration::new(&self.compile_options(repository, None), &text, &float).map(Some)
    }

    fn build(
        &self,
        scheme: &Scheme,
        repository: &Path,
        place: &Place,
        calibration: Option<&mut calibrate::Calibration>,
        output: &Output,
    ) -> Result<Entry> {
        output.say(&format!("building {}", scheme.name));
        let dir = place.path().join(scheme.name.replace(':', "-"));
        let options = self.compile_options(repository, Some(scheme.recipe.clone()));
        let record = calibration.as_ref().map(|calibration| calibration.record.clone());
        let known = calibration.map(|known| known as &mut dyn write::Calibration).zip(record.clone());
        compile::write_calibrated(&compile(&options)?, &options, &dir, Force::Yes, known, |_| {})?.commit()?;
        let text = self.calibrate.as_deref().map(file_name).unwrap_or_default();
        let calibration = record.map(|record| Calibration { text, record });
        Ok(Entry { name: scheme.name.clone(), dir, calibration })
    }

    /// What the report calls the model: not where the user keeps it.
    fn model(&self) -> String {
        let folder = self.repo.file_name().filter(|_| self.repo.is_dir());
        folder.map_or_else(|| self.repo.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    fn speed(&self) -> bench::Plan {
        bench::Plan {
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            repeat: self.repeat,
            loads: 1,
            past: vec![0],
            batch: 1,
            apart: false,
            session: session::Options { threads: self.threads, ..session::Options::default() },
        }
    }

    fn compile_options(&self, repository: &Path, recipe: Option<Recipe>) -> compile::Options {
        compile::Options {
            repository: repository.to_owned(),
            adapter: if self.ignore_adapter { Adapter::Ignore } else { Adapter::Refuse },
            template: self.template.clone(),
            target: self.target,
            element: ElementType::F32,
            padding: Padding::Any,
            positions: self.target.positions,
            logits: Logits::All,
            max_length: None,
            allowed_keys: self.allow_unused_key.clone(),
            allowed_tensors: self.allow_unused_tensor.clone(),
            weights: Weights::Pack { shard_size: None },
            recipe,
            cache: KvCache::Float,
        }
    }

    /// The user's text, the golden's, or the golden's rows.
    fn tokens(&self, repository: &Path) -> Result<Tokens> {
        let golden = repository.join("golden.safetensors");
        let golden = if golden.is_file() { Some(Golden::read(&golden)?) } else { None };
        let recorded = golden.as_ref().and_then(Golden::evaluation).filter(|evaluation| evaluation.text.is_file());
        let window = recorded.as_ref().and_then(|evaluation| evaluation.window).unwrap_or(WINDOW);
        let window = window.min(GenerationConfig::read(repository)?.context.unwrap_or(window));
        let tokens = match (self.text.clone().or(recorded.map(|evaluation| evaluation.text)), golden) {
            (Some(text), _) => {
                let windows = text_windows(&Tokenizer::open(repository)?, &text, window)?;
                Tokens { name: file_name(&text), windows }
            }
            (None, Some(golden)) => {
                let Golden { input_ids: ids, attention_mask: mask, position_ids: positions, .. } = golden;
                let windows = prompt_windows(&Prompt { ids, mask, positions });
                Tokens { name: "the golden's rows".to_owned(), windows }
            }
            (None, None) => {
                return Err(Error::new(Code::UsageInvalid, "--text")
                    .found("no text, and no golden.safetensors in the repository")
                    .expected("a text to compare on")
                    .help("give --text FILE: some pages of what the model is for"));
            }
        };
        Ok(Tokens { windows: at_most(tokens.windows, self.tokens), ..tokens })
    }
}

/// The first tokens of some windows.
fn at_most(windows: Vec<Window>, most: Option<usize>) -> Vec<Window> {
    let mut left = most.unwrap_or(usize::MAX);
    let cut = windows.into_iter().map(|mut window| {
        window.ids.truncate(left);
        window.targets.truncate(left);
        left -= window.ids.len();
        window
    });
    cut.filter(|window| !window.ids.is_empty()).collect()
}

/// Where builds lie: the user's directory, or one that goes away.
enum Place {
    Kept(PathBuf),
    Temporary(tempfile::TempDir, #[expect(dead_code, reason = "it is dropped with the directory")] Ending),
}

impl Place {
    fn new(keep: Option<&Path>) -> Result<Self> {
        if let Some(dir) = keep {
            return fs::create_dir_all(dir).map(|()| Self::Kept(dir.to_owned())).map_err(|e| Error::io(dir, &e));
        }
        let dir = tempfile::tempdir().map_err(|e| Error::io(&std::env::temp_dir(), &e))?;
        let ending = interrupt::remove_at_end(dir.path());
        Ok(Self::Temporary(dir, ending))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(dir) => dir,
            Self::Temporary(dir, _) => dir.path(),
        }
    }
}

/// What the float build is called.
const REFERENCE: &str = "float32";

/// The word of a scheme that is calibrated.
const CALIBRATED: &str = "calibrated";

/// A way to quantise that is compared.
struct Scheme {
    name: String,
    recipe: Recipe,
    /// Whether errors are weighed by what matrices are multiplied with.
    calibrated: bool,
}

impl Scheme {
    /// What the others are compared with.
    fn reference() -> Result<Self> {
        let recipe = Recipe::new("float", &Changes::default())?;
        Ok(Self { name: REFERENCE.to_owned(), recipe, calibrated: false })
    }

    /// `q4`, `int4:asym:64`, `q4:calibrated`.
    fn parse(scheme: &str) -> Result<Self> {
        let refused = |found: String| Error::new(Code::UsageInvalid, "--schemes").found(found);
        let mut words = scheme.split(':');
        let name = words.next().unwrap_or_default();
        let (mut changes, mut calibrated) = (Changes::default(), false);
        for word in words {
            match word {
                "sym" => changes.symmetric = Some(true),
                "asym" => changes.symmetric = Some(false),
                "nearest" => changes.algorithm = Some(quantize::Algorithm::Nearest),
                "search" => changes.algorithm = Some(quantize::Algorithm::Search),
                "f16" => changes.scales = Some(quantize::ScaleType::Float16),
                CALIBRATED => calibrated = true,
                size => {
                    changes.block_size = Some(size.parse().map_err(|_| {
                        refused(format!("`{word}` in `{scheme}`")).expected(
                            "sym, asym, nearest, search, f16, calibrated or a block size after a scheme's name",
                        )
                    })?);
                }
            }
        }
        let recipe = Recipe::new(name, &changes).map_err(|error| Error { subject: "--schemes".to_owned(), ..error })?;
        if calibrated && !recipe.quantises() {
            return Err(refused(format!("`{scheme}`, which rounds nothing"))
                .expected(format!("`{CALIBRATED}` after a scheme that rounds, such as q4:{CALIBRATED}")));
        }
        Ok(Self { name: scheme.to_owned(), recipe, calibrated })
    }

    /// The same, calibrated.
    fn with_calibration(&self) -> Self {
        Self { name: format!("{}:{CALIBRATED}", self.name), recipe: self.recipe.clone(), calibrated: true }
    }
}

/// `NAME=DIR`.
fn entry(with: &str) -> Result<Entry> {
    let parts = with.split_once('=').filter(|(name, dir)| !name.is_empty() && !dir.is_empty());
    let (name, dir) = parts.ok_or_else(|| {
        Error::new(Code::UsageInvalid, "--with").found(with).expected("NAME=DIR, such as other=out/dir")
    })?;
    Ok(Entry { name: name.to_owned(), dir: PathBuf::from(dir), calibration: None })
}

/// Names are what rows and directories are told apart by.
fn check_names(schemes: &[Scheme], others: &[Entry]) -> Result<()> {
    let mut seen = vec![REFERENCE];
    let schemes = schemes.iter().map(|scheme| scheme.name.as_str());
    for name in schemes.chain(others.iter().map(|entry| entry.name.as_str())) {
        if seen.contains(&name) {
            return Err(Error::new(Code::UsageInvalid, "--schemes")
                .found(format!("`{name}` twice"))
                .expected("it once"));
        }
        seen.push(name);
    }
    Ok(())
}

/// What people call a file.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
