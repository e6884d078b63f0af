//! Quantised checkpoints: recognised, decoded in full and by pieces, and asked for their affine form.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use hf2onnx::element::StoredType;
use hf2onnx::encoding::{
    Affine, AffineRows, Catalogue, Configs, Logical, Parts, Role, Stored, affine, affine_rows, decode_rows, order,
};
use hf2onnx::error::{Code, Error, Result};
use hf2onnx::read::{Checkpoint, Repository, TensorInfo, json_object, safetensors_header};
use serde_json::{Map, Value, json};

use super::{instead, one_of, says};

/// Most bytes of a file that a list of tensors is made into.
const COMPOSED: u64 = 1 << 16;
/// Most values that a byte of codes stands for: those of one bit.
const VALUES_OF_A_BYTE: u64 = 8;
/// Most pieces of a weight that are read one by one.
const PIECES: usize = 12;
/// How many values and tensors an input can change.
const CHANGES: usize = 8;
/// What settings say.
const WORDS: &str = "gptq gptq_v2 awq auto-round auto_round:auto_gptq auto_round:auto_awq compressed-tensors fp8 mxfp8 \
    fbgemm_fp8 mxfp4 modelopt bitsandbytes hqq quanto pack-quantized int-quantized float-quantized \
    naive-quantized mxfp8-quantized nvfp4-pack-quantized mxfp4-pack-quantized tensor channel group block \
    tensor_group float int int2 int4 int8 qint4 qfloat8_e5m2 FP8 NVFP4 W4A16_AWQ bfloat16 float16 Linear";
const SIDECARS: [&str; 3] = ["quantize_config.json", "hf_quant_config.json", "quanto_qmap.json"];

/// A configuration and a checkpoint: a byte that chooses the form, JSON up to a byte of 0, and the file.
///
/// The form's lowest bit: 0 for a safetensors file as it is, 1 for one that is made of `{"name": ["U8", [2, 3]]}`, a
/// byte of 0 and data that is repeated as often as it takes, so that most changes leave a file that is none the less
/// right. The next bit: 1 reads through a repository on disk as well. The third: 1 where [`CHANGES`] changes of values,
/// types and sizes, four bytes each, stand before the JSON. That is config.json, with the files beside it under their
/// names and `shapes`, what the architecture says, as further keys.
pub fn encoding(bytes: &[u8]) {
    let Some((form, rest)) = bytes.split_first() else { return };
    let (changes, rest) = if form / 4 % 2 == 1 { rest.split_at(rest.len().min(4 * CHANGES)) } else { (&[][..], rest) };
    let Some((text, rest)) = halves(rest) else { return };
    let mut config = match json_object(text, Path::new("config.json")) {
        Ok(config) => config,
        Err(error) => return says(&error),
    };
    changes.as_chunks().0.iter().for_each(|change| change_setting(&mut config, *change));
    let file = if form % 2 == 0 { Some(Cow::Borrowed(rest)) } else { composed(rest, changes).map(Cow::Owned) };
    let Some(file) = file else { return };
    let sidecars = SIDECARS.map(|name| match config.shift_remove(name) {
        Some(Value::Object(map)) => Some(map),
        _ => None,
    });
    let said = config.shift_remove("shapes").unwrap_or_default();
    let shapes = |name: &str| {
        let size = |size: &Value| size.as_u64().and_then(|size| usize::try_from(size).ok());
        said.get(name)?.as_array()?.iter().map(size).collect::<Option<Vec<usize>>>()
    };
    match safetensors_header(&file, Path::new("model.safetensors")) {
        Ok(tensors) => in_memory(&config, &sidecars, &Memory { file: &file, tensors }, &shapes),
        Err(error) => return says(&error),
    }
    if form / 2 % 2 == 1 {
        on_disk(&config, &sidecars, &file, &shapes);
    }
}

type Shapes<'a> = dyn Fn(&str) -> Option<Vec<usize>> + 'a;

/// A text, and what stands behind the first byte of 0, which JSON has no place for.
fn halves(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some((std::str::from_utf8(bytes.get(..end)?).ok()?, bytes.get(end + 1..)?))
}

/// A safetensors file of a list of tensors.
fn composed(bytes: &[u8], changes: &[u8]) -> Option<Vec<u8>> {
    let (list, data) = halves(bytes)?;
    let mut list: Map<String, Value> = serde_json::from_str(list).ok()?;
    changes.as_chunks().0.iter().for_each(|change| change_tensor(&mut list, *change));
    let (mut header, mut end) = (Map::new(), 0u64);
    for (name, tensor) in list {
        let sizes = tensor.get(1)?.as_array()?.iter().map(|size| usize::try_from(size.as_u64()?).ok());
        let shape = sizes.collect::<Option<Vec<usize>>>()?;
        let dtype = StoredType::parse(tensor.get(0)?.as_str()?)?;
        let start = end;
        end = end.checked_add(dtype.byte_length(&shape)?).filter(|end| *end <= COMPOSED)?;
        header.insert(name, json!({ "dtype": dtype.as_str(), "shape": shape, "data_offsets": [start, end] }));
    }
    let header = serde_json::to_vec(&header).ok()?;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let data = if data.is_empty() { &[0] } else { data };
    file.extend(data.iter().cycle().take(usize::try_from(end).ok()?));
    Some(file)
}

/// Another value in the place of one, however deep: whether, which one, to what, and how much are a byte each.
fn change_setting(config: &mut Map<String, Value>, [kind, chosen, new, amount]: [u8; 4]) {
    let mut leaves = Vec::new();
    config.values_mut().for_each(|value| collect(value, &mut leaves));
    let count = leaves.len().max(1);
    let Some(leaf) = leaves.into_iter().nth(usize::from(chosen) % count).filter(|_| kind % 3 == 1) else { return };
    *leaf = match leaf {
        Value::String(_) if new % 4 != 0 => json!(one_of(&WORDS.split(' ').collect::<Vec<_>>(), amount)),
        _ => instead(new, amount, leaf),
    };
}

fn collect<'v>(value: &'v mut Value, leaves: &mut Vec<&'v mut Value>) {
    match value {
        Value::Object(map) => map.values_mut().for_each(|value| collect(value, leaves)),
        Value::Array(list) => list.iter_mut().for_each(|value| collect(value, leaves)),
        leaf => leaves.push(leaf),
    }
}

/// Another type, another size, or no tensor at all.
fn change_tensor(list: &mut Map<String, Value>, [kind, chosen, new, amount]: [u8; 4]) {
    let count = list.len().max(1);
    let Some(name) = list.keys().nth(usize::from(chosen) % count).filter(|_| kind % 3 == 2).cloned() else { return };
    let Some(tensor) = list.get_mut(&name).and_then(Value::as_array_mut) else { return };
    let [dtype, Value::Array(shape)] = tensor.as_mut_slice() else { return };
    let count = shape.len().max(1);
    let size = shape.get_mut(usize::from(new / 8) % count);
    match (new % 8, size) {
        (0, _) => {
            *dtype = json!(one_of(&StoredType::ALL.iter().map(|dtype| dtype.as_str()).collect::<Vec<_>>(), amount));
        }
        (1, _) => drop(list.shift_remove(&name)),
        (2, _) => shape.push(json!(amount)),
        (3, _) => drop(shape.pop()),
        (4, _) => shape.reverse(),
        (5, Some(size)) => *size = json!(u64::from(amount) * 32),
        (6, Some(size)) => *size = json!(size.as_u64().unwrap_or(0).saturating_mul(amount.into()) / 16),
        (_, Some(size)) => *size = json!(amount),
        (_, None) => {}
    }
}

/// A file that is lent, not read.
struct Memory<'b> {
    file: &'b [u8],
    tensors: Vec<TensorInfo>,
}

impl Parts for Memory<'_> {
    fn bytes(&self, tensor: &str, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let outside =
            || Error::new(Code::WeightsCorrupt, "tensor").found(format!("no {tensor}, or no bytes {range:?}"));
        let found = self.tensors.iter().find(|found| found.name == tensor && range.end <= found.length);
        let at = |at: u64| found.and_then(|found| usize::try_from(found.offset.checked_add(at)?).ok());
        let (Some(start), Some(end)) = (at(range.start), at(range.end)) else { return Err(outside()) };
        self.file.get(start..end).map(Cow::Borrowed).ok_or_else(outside)
    }
}

fn in_memory(config: &Map<String, Value>, sidecars: &Sidecars, memory: &Memory<'_>, shapes: &Shapes<'_>) {
    let [quantize_config, hf_quant_config, quanto_qmap] = sidecars.each_ref().map(Option::as_ref);
    let configs = Configs { config, quantize_config, hf_quant_config, quanto_qmap };
    let stored =
        |tensor: &TensorInfo| Stored { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
    let stored: Vec<Stored> = memory.tensors.iter().map(stored).collect();
    match Catalogue::build(&configs, &stored, memory, shapes) {
        Ok(catalogue) => catalogue.iter().flat_map(|all| &all.weights).for_each(|weight| whole(weight, memory)),
        Err(error) => says(&error),
    }
}

type Sidecars = [Option<Map<String, Value>>; 3];

/// A weight in full, then in pieces, then as integers.
fn whole(weight: &Logical, parts: &dyn Parts) {
    let (rows, columns) = (weight.rows(), weight.columns());
    let codes = weight.part(Role::Codes).map_or(0, Stored::bytes);
    let count = rows.checked_mul(columns).map_or(u64::MAX, |count| count as u64);
    assert!(count <= codes.saturating_mul(VALUES_OF_A_BYTE), "{count} values of {codes} bytes: {weight:?}");
    let values = match decode_rows(weight, parts, 0..rows) {
        Ok(values) => bits(&values),
        Err(error) => panic!("a weight of an intact file can not be decoded: {error}"),
    };
    assert_eq!(values.len() as u64, count, "{weight:?}");
    for piece in [1, 3, 17] {
        for rows in pieces(rows, piece) {
            let wanted = values.get(rows.start * columns..rows.end * columns);
            let got = decode_rows(weight, parts, rows.clone()).map(|values| bits(&values));
            assert_eq!(got.ok().as_deref(), wanted, "rows {rows:?} of {weight:?}");
        }
    }
    let outside = [rows..rows.saturating_add(1), Range { start: rows.saturating_add(1), end: rows }];
    assert!(outside.into_iter().all(|rows| decode_rows(weight, parts, rows).is_err()), "{weight:?}");
    integers(weight, parts, &values);
}

/// The first pieces of this size, and the last.
fn pieces(rows: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let last = rows.saturating_sub(size)..rows;
    (0..rows).step_by(size).take(PIECES).map(move |start| start..rows.min(start + size)).chain([last])
}

/// The bits of values; every NaN counts as the same.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
}

/// The affine form of a weight that has one, against its values.
fn integers(weight: &Logical, parts: &dyn Parts, values: &[u32]) {
    let Ok(form) = affine(weight) else { return };
    let order = match order(weight, parts) {
        Ok(order) => order,
        Err(error) => return says(&error),
    };
    assert_eq!(form.ordered, order.is_some(), "{weight:?}");
    for rows in [1, 5, 24].into_iter().flat_map(|size| pieces(weight.rows(), size)) {
        match affine_rows(weight, parts, rows.clone(), order.as_deref()) {
            Ok(made) => same(weight, &form, &made, &rows, (order.as_deref(), values)),
            Err(error) => panic!("rows {rows:?} of the affine form: {error}"),
        }
    }
}

fn same(
    weight: &Logical,
    form: &Affine,
    made: &AffineRows,
    rows: &Range<usize>,
    (order, values): (Option<&[usize]>, &[u32]),
) {
    let columns = weight.columns();
    assert_eq!(made.codes.len(), rows.len() * columns, "{weight:?}");
    assert_eq!((made.scales.len(), made.zeros.len()), (rows.len() * made.blocks(), rows.len() * made.blocks()));
    assert!(made.codes.iter().all(|code| u32::from(*code) < 1 << form.bits), "{form:?}: {weight:?}");
    for (n, row) in rows.clone().enumerate() {
        for k in 0..columns {
            let column = order.map_or(Some(k), |order| order.get(k).copied());
            let wanted = column.and_then(|column| values.get(row * columns + column)).copied();
            let got = made.value(n, k).map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() });
            assert!(
                got.is_some() && (got == wanted || !form.exact),
                "{got:?}, not {wanted:?}, at {row}, {k}: {weight:?}"
            );
        }
    }
    assert_eq!((made.value(rows.len(), 0), made.value(usize::MAX, usize::MAX)), (None, None), "{weight:?}");
}

/// The same through files, as the compiler reads them.
fn on_disk(config: &Map<String, Value>, sidecars: &Sidecars, file: &[u8], shapes: &Shapes<'_>) {
    let Ok(dir) = tempfile::tempdir() else { return };
    let beside = SIDECARS.into_iter().zip(sidecars).filter_map(|(name, map)| Some((name, map.as_ref()?)));
    for (name, map) in beside.chain([("config.json", config)]) {
        let Ok(text) = serde_json::to_vec(map) else { return };
        if std::fs::write(dir.path().join(name), text).is_err() {
            return;
        }
    }
    if std::fs::write(dir.path().join("model.safetensors"), file).is_err() {
        return;
    }
    let mut repository = match Repository::open(dir.path()) {
        Ok(repository) => repository,
        Err(error) => return says(&error),
    };
    match repository.decode(shapes) {
        Ok(()) => repository.checkpoint.tensors().for_each(|tensor| bytes_of(&repository.checkpoint, tensor)),
        Err(error) => says(&error),
    }
}

/// A tensor's bytes in full, and from odd places on.
fn bytes_of(checkpoint: &Checkpoint, tensor: &TensorInfo) {
    let all = match checkpoint.bytes(tensor) {
        Ok(all) => all,
        Err(error) => panic!("a tensor of an intact file can not be read: {error}"),
    };
    assert_eq!(all.len() as u64, tensor.length);
    for (start, end) in [(0, 1), (1, 4), (3, 20), (all.len() / 3, all.len() / 2 + 1), (all.len() / 2, all.len())] {
        let Some(wanted) = all.get(start..end) else { continue };
        let mut got = vec![0; wanted.len()];
        let read = checkpoint.read(tensor, start as u64, &mut got);
        assert!(read.is_ok() && got == wanted, "bytes {start}..{end} of {tensor:?}");
    }
    assert!(checkpoint.read(tensor, tensor.length, &mut [0]).is_err(), "a byte behind {tensor:?}");
    if let Some(weight) = checkpoint.logical(tensor) {
        let _ = checkpoint.storage(tensor);
        match checkpoint.affine_rows(tensor, 0..weight.rows().min(3)) {
            Ok(made) => assert_eq!(made.codes.len(), weight.rows().min(3) * weight.columns()),
            Err(error) => says(&error),
        }
    }
}
