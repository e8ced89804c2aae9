//! The best rate of encryption: AES-128-GCM over TLS records, on one core, without a connection.

use std::time::{Duration, Instant};

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::Serialize;

use crate::error::{Result, failure};
use crate::interrupt;
use crate::machine::{pin, two_cores};
use crate::statistics::Spread;

/// Most bytes of pages in a TLS record (RFC 8446, 5.1).
const RECORD_BYTES: usize = 16 << 10;

/// Records that are processed repeatedly: 128 KiB, as much as umem's pumps hold, which stays in a
/// core's L2 cache.
const RECORDS: usize = 8;

/// The header of a record, which TLS 1.3 authenticates with the pages.
const HEADER: [u8; 5] = [23, 3, 3, 0x40, 0x11];

/// The share of extra passes before the measurement, so that the core runs at its full clock.
const WARM_UP_SHARE: usize = 8;

/// Rates of encrypting and of decrypting over all rounds, Gbit/s of contents.
#[derive(Debug, Serialize)]
pub(crate) struct CipherFigure {
    pub(crate) cipher: &'static str,
    pub(crate) seal_gbps: Spread,
    pub(crate) open_gbps: Spread,
}

impl CipherFigure {
    /// The best rate of one lane, with a core for each end's records: the slower of the two
    /// directions.
    pub(crate) fn lane_gbps(&self) -> f64 {
        self.seal_gbps.median.min(self.open_gbps.median)
    }
}

/// The measurement, round by round.
#[derive(Default)]
pub(crate) struct Cipher {
    seal_gbps: Vec<f64>,
    open_gbps: Vec<f64>,
}

impl Cipher {
    /// Encrypts `bytes`, and then decrypts them, on the core of a floor's sender.
    pub(crate) fn round(&mut self, bytes: usize) -> Result<()> {
        interrupt::check()?;
        let [core, _] = two_cores()?;
        let measured = std::thread::spawn(move || {
            pin(core)?;
            measure(bytes.div_ceil(RECORDS * RECORD_BYTES))
        });
        let (seal_gbps, open_gbps) = super::joined(measured.join())?;
        self.seal_gbps.push(seal_gbps);
        self.open_gbps.push(open_gbps);
        Ok(())
    }

    pub(crate) fn figure(&self) -> CipherFigure {
        CipherFigure {
            cipher: "AES-128-GCM",
            seal_gbps: Spread::of(self.seal_gbps.clone()),
            open_gbps: Spread::of(self.open_gbps.clone()),
        }
    }
}

/// Processes the records this many times in each direction.
fn measure(times: usize) -> Result<(f64, f64)> {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map(LessSafeKey::new);
    let key = key.or_else(|_| failure("AES-128-GCM is not available"))?;
    let plain: Vec<u8> = (0..RECORD_BYTES).map(|at| (at / 7) as u8).collect();
    let mut records = vec![plain.clone(); RECORDS];
    let warm_up = times.div_ceil(WARM_UP_SHARE);
    seal(&key, &mut records, warm_up)?;
    let seal_gbps = seal(&key, &mut records, times)?;

    let mut sealed = plain.clone();
    let tag = key.seal_in_place_separate_tag(nonce(0), Aad::from(HEADER), &mut sealed);
    sealed.extend(tag.or_else(|_| failure("a record could not be encrypted"))?.as_ref());
    let mut records = vec![sealed.clone(); RECORDS];
    open(&key, &sealed, &mut records, warm_up)?;
    let open_gbps = open(&key, &sealed, &mut records, times)?;
    if records.iter().any(|record| record[..RECORD_BYTES] != plain) {
        return failure("decryption did not return the encrypted data");
    }
    Ok((seal_gbps, open_gbps))
}

/// Encrypts all records this many times, each time the result of the last.
fn seal(key: &LessSafeKey, records: &mut [Vec<u8>], times: usize) -> Result<f64> {
    let started = Instant::now();
    for time in 0..times {
        for (index, record) in records.iter_mut().enumerate() {
            let nonce = nonce(time * RECORDS + index);
            let tag = key.seal_in_place_separate_tag(nonce, Aad::from(HEADER), record);
            tag.map(drop).or_else(|_| failure("a record could not be encrypted"))?;
        }
    }
    Ok(gbit(times) / started.elapsed().as_secs_f64())
}

/// Decrypts a record this many times, in the place of each of them. Copying it there is not
/// measured.
fn open(key: &LessSafeKey, sealed: &[u8], records: &mut [Vec<u8>], times: usize) -> Result<f64> {
    let mut spent = Duration::ZERO;
    for _ in 0..times {
        records.iter_mut().for_each(|record| record.copy_from_slice(sealed));
        let started = Instant::now();
        for record in &mut *records {
            let opened = key.open_in_place(nonce(0), Aad::from(HEADER), record);
            opened.map(drop).or_else(|_| failure("a record did not decrypt"))?;
        }
        spent += started.elapsed();
    }
    Ok(gbit(times) / spent.as_secs_f64())
}

fn nonce(number: usize) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&(number as u64).to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Gbit of all records, this many times.
fn gbit(times: usize) -> f64 {
    (times * RECORDS * RECORD_BYTES) as f64 * 8e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_have_a_rate() {
        let mut cipher = Cipher::default();
        cipher.round(1 << 20).unwrap();
        let figure = cipher.figure();
        assert!(figure.seal_gbps.median > 0.0 && figure.open_gbps.median > 0.0);
        assert_eq!(figure.seal_gbps.rounds.len(), 1);
    }
}
