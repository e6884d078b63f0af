//! GPT-2's alphabet: a letter for each of the 256 bytes, so that a vocabulary of texts holds any bytes.

/// The byte that a letter stands for. Bytes that print stand for themselves, the others for letters from 256 on.
pub(super) fn byte(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    match u8::try_from(code) {
        Ok(byte) => prints(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|byte| !prints(*byte)).nth(usize::try_from(code).ok()?.checked_sub(256)?),
    }
}

fn prints(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// The bytes of a token that is spelled in the alphabet; nothing if it is not.
pub(super) fn bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_the_librarys() {
        let mut letters: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        letters.sort_unstable();
        let mut spelled: Vec<u8> = letters.iter().map(|letter| byte(*letter).unwrap()).collect();
        spelled.sort_unstable();
        assert_eq!(spelled, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!((byte('Ġ'), byte('Ċ'), byte('A'), byte('é')), (Some(b' '), Some(b'\n'), Some(b'A'), Some(0xe9)));
        assert_eq!((byte(' '), byte('\u{ad}'), byte('\u{144}'), byte('漢')), (None, None, None, None));
        assert_eq!((bytes("naÃ¯ve"), bytes("a b")), (Some("naïve".into()), None));
    }
}
