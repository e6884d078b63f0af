use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A tokenizer of this decoder whose tokens are numbered as they are listed, and behind them a special token and an
/// added one that is not special.
fn tokenizer(tokens: &[String], model: &str, decoder: &Value) -> Tokenizer {
    let numbered = || tokens.iter().zip(0_u32..);
    let model = match model {
        "Unigram" => {
            let vocab: Vec<Value> = numbered().map(|(token, id)| json!([token, -f64::from(id)])).collect();
            json!({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false})
        }
        "WordPiece" | "WordLevel" => {
            let vocab: serde_json::Map<_, _> = numbered().map(|(token, id)| (token.clone(), id.into())).collect();
            json!({"type": model, "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab})
        }
        _ => {
            let vocab: serde_json::Map<_, _> = numbered().map(|(token, id)| (token.clone(), id.into())).collect();
            json!({"type": "BPE", "byte_fallback": model == "fallback", "vocab": vocab, "merges": []})
        }
    };
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    let json = json!({
        "version": "1.0", "model": model, "decoder": decoder,
        "added_tokens": [added(tokens.len(), "<end>", true), added(tokens.len() + 1, "<tool é>", false)],
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

fn owned(tokens: &[&str]) -> Vec<String> {
    tokens.iter().map(|token| (*token).to_owned()).collect()
}

/// One token a byte, in the alphabet of GPT-2, and a few longer ones that begin or end inside a character.
fn byte_level() -> Tokenizer {
    let letter = |byte: u8| (0..0x200).filter_map(char::from_u32).find(|l| alphabet::byte(*l) == Some(byte)).unwrap();
    let spell = |bytes: &[u8]| bytes.iter().map(|byte| letter(*byte)).collect::<String>();
    let mut tokens: Vec<String> = (0..=u8::MAX).map(|byte| spell(&[byte])).collect();
    let crab = "🦀".as_bytes();
    tokens.extend([&crab[..2], &crab[2..], &crab[1..], b" the", "ïv".as_bytes(), &crab[..3]].map(spell));
    tokenizer(
        &tokens,
        "BPE",
        &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
    )
}

/// Words and the 256 bytes, as Llama 2 has them; with `strip` the text loses the space before its first word.
fn byte_fallback(strip: bool) -> Tokenizer {
    let mut tokens = owned(&["▁one", "▁two", "▁", "▁▁", "three", "é", "<0x+5>", "<0xé>"]);
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    decoders.extend(strip.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
    tokenizer(&tokens, "fallback", &json!({"type": "Sequence", "decoders": decoders}))
}

fn unigram(scheme: &str) -> Tokenizer {
    let tokens = owned(&["?", "▁", "▁a", "▁▁b", "c▁d", "漢", "."]);
    tokenizer(
        &tokens,
        "Unigram",
        &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true}),
    )
}

/// Every decoder of the library, alone and in sequences that look at the whole text.
fn others() -> Vec<Tokenizer> {
    let words = owned(&[
        "?", "##s", "a", "a</w>", "b</w>c", " .", ".", "<pad>", "|", "▁", "▁a", "<0x41>", "<0xF0>", " ", "aa ",
    ]);
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let strip = |start: usize, stop: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let (fuse, bytes) = (json!({"type": "Fuse"}), json!({"type": "ByteFallback"}));
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let bpe = json!({"type": "BPEDecoder", "suffix": "</w>"});
    let sequence = |decoders: Vec<Value>| json!({"type": "Sequence", "decoders": decoders});
    let decoders = [
        Value::Null,
        piece.clone(),
        bpe.clone(),
        json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}),
        fuse.clone(),
        bytes.clone(),
        strip(2, 0),
        sequence(vec![bpe.clone(), fuse.clone()]),
        sequence(vec![fuse.clone(), replace("aa", "b"), replace("▁", " ")]),
        sequence(vec![sequence(vec![bytes.clone(), fuse.clone()]), strip(1, 1)]),
        sequence(vec![fuse.clone(), bytes.clone(), metaspace.clone()]),
        sequence(vec![metaspace, piece.clone(), fuse.clone(), fuse.clone(), strip(3, 0), strip(1, 0)]),
        sequence(vec![fuse, piece]),
        sequence(vec![level, bpe]),
    ];
    decoders.into_iter().map(|decoder| tokenizer(&words, "WordLevel", &decoder)).collect()
}

/// The text of all pieces, and the length of it after each token. Nothing where the library fails on the tokens.
fn streamed(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Option<(String, Vec<usize>)> {
    let mut stream = Stream::new(tokenizer, prompt).ok()?;
    let (mut text, mut lengths) = (String::new(), Vec::new());
    for id in ids {
        text += &stream.push(*id).ok()?;
        lengths.push(text.len());
    }
    text += &stream.finish().ok()?;
    Some((text, lengths))
}

/// The pieces together are the whole text; behind a prompt, what the text has beyond the prompt's.
fn check(tokenizer: &Tokenizer, ids: &[u32], prompt: usize) {
    let Ok(whole) = tokenizer.decode(ids) else { return };
    assert_eq!(streamed(tokenizer, &[], ids).map(|(text, _)| text), Some(whole.clone()), "{ids:?}");
    let (prompt, new) = ids.split_at(prompt.min(ids.len()));
    let Ok(before) = tokenizer.decode(prompt) else { return };
    let same: usize = before.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    assert_eq!(
        streamed(tokenizer, prompt, new).map(|(text, _)| text).as_deref(),
        Some(&whole[same..]),
        "{prompt:?} {new:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn pieces_of_bytes_are_the_whole_text(ids in prop::collection::vec(0..266_u32, 0..40), prompt in 0..10_usize) {
        let tokenizer = byte_level();
        check(&tokenizer, &ids, prompt);
        // Nothing waits but the bytes of one character.
        let (text, lengths) = streamed(&tokenizer, &[], &ids).unwrap();
        for (length, end) in lengths.into_iter().zip(1..) {
            let waiting = tokenizer.decode(&ids[..end]).unwrap()[length..].to_owned();
            prop_assert!(waiting.is_empty() || waiting == "\u{fffd}", "{waiting:?} waits behind {:?}", &text[..length]);
        }
    }

    #[test]
    fn pieces_of_words_with_bytes_as_the_fallback_are_the_whole_text(
        strip: bool,
        // Bytes that are UTF-8 and bytes that are not, in runs.
        ids in prop::collection::vec(prop_oneof![0..10_u32, 0..266_u32, Just(8 + 0xf0), Just(8 + 0xc3), Just(8 + 0xa9), Just(8 + 0x0a)], 0..40),
        prompt in 0..10_usize,
    ) {
        let tokenizer = byte_fallback(strip);
        check(&tokenizer, &ids, prompt);
        // Nothing waits but a run of bytes.
        let (_, lengths) = streamed(&tokenizer, &[], &ids).unwrap();
        for (length, end) in lengths.into_iter().zip(1..) {
            let byte = |id: &u32| tokenizer.token(*id).is_none_or(|token| decoding::byte_token(&token).is_some());
            let run = ids[..end].iter().rev().take_while(|id| byte(id)).count();
            prop_assert_eq!(length, tokenizer.decode(&ids[..end - run]).unwrap().len());
        }
    }

    #[test]
    fn pieces_of_a_unigram_tokenizer_are_the_whole_text(
        scheme in prop::sample::select(vec!["always", "first", "never"]),
        ids in prop::collection::vec(0..10_u32, 0..40),
        prompt in 0..10_usize,
    ) {
        let tokenizer = unigram(scheme);
        check(&tokenizer, &ids, prompt);
        let (_, lengths) = streamed(&tokenizer, &[], &ids).unwrap();
        for (length, end) in lengths.into_iter().zip(1..) {
            prop_assert_eq!(length, tokenizer.decode(&ids[..end]).unwrap().len(), "nothing waits");
        }
    }

    #[test]
    fn pieces_of_any_other_decoder_are_the_whole_text(ids in prop::collection::vec(0..18_u32, 0..12), prompt in 0..6_usize) {
        for tokenizer in others() {
            check(&tokenizer, &ids, prompt);
        }
    }
}

#[test]
fn a_character_is_printed_only_when_it_is_whole() {
    let tokenizer = byte_level();
    let text = "naïve 🦀 漢字";
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    let mut stream = Stream::new(&tokenizer, &[u32::from(b'x')]).unwrap();
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(pieces.concat(), text);
    assert_eq!(pieces.iter().filter(|piece| !piece.is_empty()).count(), text.chars().count());
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn a_stray_byte_takes_nothing_from_the_words_behind_it() {
    let tokenizer = byte_fallback(true);
    let id = |token: &str| tokenizer.id(token).unwrap();
    let ids = [id("<0x0A>"), id("<0xF0>"), id("▁two"), id("▁one"), id("<end>")];
    let (text, lengths) = streamed(&tokenizer, &[id("▁one")], &ids).unwrap();
    assert_eq!((text.as_str(), lengths), ("\u{fffd}\u{fffd} two one", vec![0, 0, 10, 14, 14]));
    // A space at the start is the prompt's to lose.
    assert_eq!(streamed(&tokenizer, &[], &ids[2..]).unwrap().0, "two one");
    assert_eq!(streamed(&tokenizer, &ids[2..3], &ids[3..]).unwrap().0, " one");
    // The prompt's bytes belong to a run that goes on.
    assert_eq!(streamed(&tokenizer, &[id("<0xC3>"), id("<0xA9>")], &[id("<0x41>"), id("▁two")]).unwrap().0, "A two");
    assert_eq!(streamed(&tokenizer, &[id("<0xC3>")], &[id("<0xA9>")]).unwrap().0, "é");
}

#[test]
fn nothing_to_decode_is_no_text_whatever_the_decoder() {
    for tokenizer in others() {
        let special = tokenizer.id("<end>").unwrap();
        for ids in [&[][..], &[special], &[special, 9999]] {
            assert_eq!(tokenizer.decode(ids).unwrap(), "");
            assert_eq!(streamed(&tokenizer, ids, ids).unwrap(), (String::new(), vec![0; ids.len()]));
        }
    }
}

#[test]
fn truncation_in_the_file_is_ignored() {
    let mut json: Value = serde_json::from_str(
        r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#,
    )
    .unwrap();
    json["truncation"] = json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("aaaa", true).unwrap(), [0; 4]);
}
